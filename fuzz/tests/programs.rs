//! The programs run what is in a file, however they were built: so that people can look at what was found.

use std::path::Path;
use std::process::Command;

#[test]
fn each_runs_a_file() {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("data");
    let data: Vec<u8> = (0..=255).cycle().take(2048).collect();
    std::fs::write(&file, data).expect("a file");
    for program in [env!("CARGO_BIN_EXE_selection"), env!("CARGO_BIN_EXE_adoption")] {
        let output = Command::new(program).arg(&file).output().expect(program);
        assert!(output.status.success(), "{program}: {output:?}");
    }
}
