//! Checks on the object of the kernel programs: what would fail at load time, or worse, load
//! something else than what was written, fails the build.

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

/// The programs: function, and the section that says what kind of program it is.
const PROGRAMS: [(&str, &str); 16] = [
    ("mesh_connect4", "cgroup/connect4"),
    ("mesh_connect6", "cgroup/connect6"),
    ("mesh_sendmsg4", "cgroup/sendmsg4"),
    ("mesh_sendmsg6", "cgroup/sendmsg6"),
    ("mesh_recvmsg4", "cgroup/recvmsg4"),
    ("mesh_recvmsg6", "cgroup/recvmsg6"),
    ("mesh_release", "cgroup/sock_release"),
    ("mesh_peername4", "cgroup/getpeername4"),
    ("mesh_peername6", "cgroup/getpeername6"),
    ("mesh_destroy", "tp_btf/tcp_destroy_sock"),
    ("mesh_destroy_too", "tp_btf/tcp_destroy_sock"),
    ("mesh_error", "tp_btf/inet_sk_error_report"),
    ("mesh_error_too", "tp_btf/inet_sk_error_report"),
    ("mesh_reset", "tp_btf/tcp_receive_reset"),
    ("mesh_reset_too", "tp_btf/tcp_receive_reset"),
    ("mesh_retransmit", "tp_btf/tcp_retransmit_skb"),
];

/// Checks an object.
///
/// # Errors
///
/// Every problem found, each with what follows from it and what to do.
pub(crate) fn check(object: &[u8]) -> Result<()> {
    let problems = Facts::read(object)?.problems();
    if !problems.is_empty() {
        bail!("{} problem(s):\n  - {}", problems.len(), problems.join("\n  - "));
    }
    Ok(())
}

/// What the checks look at.
#[derive(Debug, Default)]
struct Facts {
    /// Name and size of each section.
    sections: Vec<(String, u64)>,
    /// Name of each function, and of the section it is in.
    functions: Vec<(String, String)>,
}

impl Facts {
    fn read(object: &[u8]) -> Result<Self> {
        let file = object::File::parse(object).context("this is no ELF object")?;
        let mut facts = Self::default();
        for section in file.sections() {
            facts.sections.push((section.name()?.to_owned(), section.size()));
        }
        for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
            let section = match symbol.section_index() {
                Some(index) => file.section_by_index(index)?.name()?.to_owned(),
                None => "(undefined)".to_owned(),
            };
            facts.functions.push((symbol.name()?.to_owned(), section));
        }
        Ok(facts)
    }

    fn has_section(&self, name: &str) -> bool {
        self.sections.iter().any(|(section, size)| section == name && *size > 0)
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let texts: Vec<&str> = self
            .sections
            .iter()
            .filter(|(name, size)| name.starts_with(".text") && *size > 0)
            .map(|(name, _)| name.as_str())
            .collect();
        if texts.len() > 1 {
            problems.push(format!(
                "there is more than one text section ({}): the loader tells functions apart by \
                 address alone and may link a call to the wrong one; do not use #[cold] in the \
                 kernel programs",
                texts.join(", ")
            ));
        }
        for (function, section) in &self.functions {
            if self.sections.iter().any(|(name, _)| name == function) {
                problems.push(format!(
                    "the function {function} (in {section}) is named like a section, and the \
                     linker mixes them up; rename the function"
                ));
            }
        }
        for (program, section) in PROGRAMS {
            match self.functions.iter().find(|(function, _)| function == program) {
                None => problems.push(format!(
                    "the program {program} is missing; it should be in section {section}"
                )),
                Some((_, found)) if found != section => problems.push(format!(
                    "the program {program} is in section {found} and should be in {section}: \
                     the loader takes its kind from there"
                )),
                Some(_) => {}
            }
        }
        if !self.has_section("license") {
            problems.push(
                "there is no section `license`: the kernel refuses helpers that are for GPL \
                 programs only; add a static with #[unsafe(link_section = \"license\")]"
                    .to_owned(),
            );
        }
        if !self.has_section(".BTF") {
            problems.push(
                "there is no section .BTF: maps and functions that need types cannot be made; \
                 build with debuginfo=2 and the linker's --btf"
                    .to_owned(),
            );
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        let named = |name: &str| (name.to_owned(), 8);
        let mut facts = Facts {
            sections: vec![named(".text"), named("license"), named(".BTF")],
            functions: vec![("memset".into(), ".text".into())],
        };
        for (program, section) in PROGRAMS {
            facts.sections.push(named(section));
            facts.functions.push((program.into(), section.into()));
        }
        facts
    }

    /// The change makes exactly one problem, and its text names the culprit.
    #[track_caller]
    fn assert_problem(change: impl FnOnce(&mut Facts), names: &str) {
        let mut facts = good();
        change(&mut facts);
        let problems = facts.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].contains(names), "{problems:?}");
    }

    #[test]
    fn a_good_object_passes() {
        assert_eq!(good().problems(), Vec::<String>::new());
    }

    #[test]
    fn each_defect_is_found() {
        assert_problem(|f| f.sections.push((".text.unlikely.".into(), 8)), ".text.unlikely.");
        assert_problem(|f| f.functions.push(("license".into(), ".text".into())), "license");
        assert_problem(|f| f.functions[1].0 = "connect4".into(), "mesh_connect4 is missing");
        assert_problem(|f| f.functions[1].1 = ".text".into(), "should be in cgroup/connect4");
        assert_problem(|f| f.sections.retain(|(name, _)| name != "license"), "`license`");
        assert_problem(|f| f.sections.retain(|(name, _)| name != ".BTF"), ".BTF");
    }

    #[test]
    fn what_is_no_object_is_an_error() {
        assert!(check(b"text").is_err());
    }
}
