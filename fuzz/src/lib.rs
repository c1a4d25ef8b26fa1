//! What is read from maps, against adversaries: what the two checks take apart is data, and all that they assert
//! holds whatever the data is. `cargo xtask fuzz` looks for data for which it does not.
//!
//! The selection logic of `mesh-common` ([`check`]) has two. One ([`racing`]) has tables as the agent writes them, and changes everything that may
//! change while a program runs: no slot outside of the tables that were read is looked at, none of another
//! frontend is chosen, and the decision ends. The other ([`damaged`]) has tables of arbitrary bytes, of
//! which each read is another one: there is no panic, and the number of reads is bounded all the same.
//!
//! The agent that takes over maps ([`check_adoption`]) has one ([`damage`]), which has written anything into
//! them: it believes nothing that makes no sense, and brings them to exactly what is wanted ([`adopting`]).

pub mod adopting;
pub mod damage;
pub mod damaged;
pub mod racing;
pub mod script;

use script::Script;

/// Has an agent take over what the data says.
pub fn check_adoption(data: &[u8]) {
    adopting::check(&Script::new(data));
}

/// Decides about a connect as the data says.
pub fn check(data: &[u8]) {
    let script = Script::new(data);
    if script.byte().is_multiple_of(2) {
        racing::check(&script);
    } else {
        damaged::check(&script);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        /// What no coverage guides, so that every build of the workspace has tried it.
        #[test]
        fn arbitrary_data(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::check(&data);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// The same.
        #[test]
        fn arbitrary_maps(data in prop::collection::vec(any::<u8>(), 0..2_000)) {
            super::check_adoption(&data);
        }
    }
}
