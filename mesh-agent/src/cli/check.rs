//! `check`: can this node run the agent?

use std::path::Path;

use super::args::CheckArgs;
use super::failure::Failure;
use super::output::Output;
use super::tables;
use crate::check::{self, Check};
use crate::config::{Config, DEFAULT_FILE};

pub(super) fn check(args: &CheckArgs, output: &Output) -> Result<(), Failure> {
    let (file, config) = match Config::load(args.config.as_deref()) {
        Ok(config) => {
            let file = args.config.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
            let found =
                if file.exists() { "valid" } else { "not there: everything has its default" };
            (Check::good("agent file", format!("{}: {found}", file.display())), config)
        }
        Err(error) => {
            let advice = "repair it: `run` refuses a file with an error";
            (Check::bad("agent file", error.to_string(), advice), Config::default())
        }
    };
    let cgroup = args.cgroup.clone().or(config.cgroup);
    let mut checks = check::run(cgroup.as_deref());
    checks.insert(0, file);
    output.print(&checks, |checks, style| tables::checks(checks, style))?;
    if check::passed(&checks) {
        return Ok(());
    }
    let missing: Vec<_> = checks
        .iter()
        .filter(|check| check.required && !check.ok)
        .map(|check| check.name.as_str())
        .collect();
    Err(Failure::failed(format!(
        "this node cannot run the agent yet: {}; the advice is beside each",
        missing.join(", ")
    )))
}
