//! What is known of a backend while its source does not have it, and when that has it again.

use super::{Client, Ejection, Phase, Policy};

impl Ejection {
    /// What is kept of it when its backend is removed.
    ///
    /// How a try ends that is under way is told of the life that ends, and decides nothing: its token is
    /// void, and the backend stays out for another time. One that was answered has brought it back.
    #[must_use]
    pub fn leave(self, policy: Policy, now: u64) -> Self {
        let phase = match self.phase() {
            Phase::In | Phase::Suspected | Phase::Ejected => return self,
            Phase::SuspectTry | Phase::Trying if self.until() <= now => {
                return self.recover(policy, now);
            }
            Phase::SuspectTry => Phase::Suspected,
            Phase::Trying => Phase::Ejected,
        };
        let until = now + policy.duration(self.level());
        Self::new(phase, self.failures(), self.level(), self.client(), until)
    }

    /// What counts of what [`Ejection::leave`] kept when the backend comes back: all of it until it ends.
    /// Of an ejection that has ended meanwhile, for as long as it lasted, that it was out and how often, as
    /// after a try.
    #[must_use]
    pub fn arrive(self, policy: Policy, now: u64) -> Self {
        if self.until() > now {
            return self;
        }
        let until = self.until() + policy.duration(self.level());
        match self.is_in() || until <= now {
            true => Self::NONE,
            false => Self::new(Phase::In, 0, self.level(), Client::NOBODY, until),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Token;
    use super::*;

    const NOW: u64 = 10_000;
    const ME: Client = Client::of_cgroup(7);

    /// 60 ticks at first.
    fn policy() -> Policy {
        Policy::new(1, 60, 3_600, 50)
    }

    fn suspected() -> Ejection {
        Ejection::NONE.fail(policy(), ME, Token::NONE, NOW).expect("a change")
    }

    fn ejected() -> Ejection {
        suspected().confirm(policy(), NOW).expect("a change")
    }

    #[test]
    fn what_runs_goes_on_as_it_was() {
        for known in [ejected(), suspected()] {
            for later in [NOW, NOW + 59] {
                assert_eq!(known.leave(policy(), NOW + 1).arrive(policy(), later), known);
            }
        }
        assert_eq!(Ejection::NONE.leave(policy(), NOW).arrive(policy(), NOW), Ejection::NONE);
        // Failures that are not enough yet.
        let policy = Policy::new(3, 60, 3_600, 50);
        let one = Ejection::NONE.fail(policy, ME, Token::NONE, NOW).expect("a change");
        assert_eq!(one.leave(policy, NOW).arrive(policy, NOW + 3_599).failures(), 1);
        assert_eq!(one.leave(policy, NOW).arrive(policy, NOW + 3_600), Ejection::NONE);
    }

    /// It is in, and fails for longer the next time; after as long again, nothing is known of it.
    #[test]
    fn what_has_ended_is_remembered_for_as_long_as_after_a_try() {
        for known in [ejected(), suspected()] {
            let kept = known.leave(policy(), NOW + 1);
            for (later, level) in [(NOW + 60, 1), (NOW + 119, 1), (NOW + 120, 0)] {
                let back = kept.arrive(policy(), later);
                assert!(back.is_in() && back.failures() == 0, "{back:?}");
                assert_eq!(back.level(), level, "{later}");
            }
            let again = kept.arrive(policy(), NOW + 119);
            let again = again.fail(policy(), ME, Token::NONE, NOW + 119).expect("a change");
            assert_eq!((again.level(), again.until()), (2, NOW + 119 + 120));
        }
    }

    /// Its token is worth nothing in the next life, whatever becomes of the connect that holds it.
    #[test]
    fn a_try_that_is_under_way_is_void() {
        for (known, phase) in [(ejected(), Phase::Ejected), (suspected(), Phase::Suspected)] {
            let trying = known.take(NOW + 60);
            let token = trying.token();
            assert!(token.is_some());
            let back = trying.leave(policy(), NOW + 61).arrive(policy(), NOW + 62);
            assert_eq!((back.phase(), back.level()), (phase, 1));
            assert_eq!((back.until(), back.token()), (NOW + 121, Token::NONE));
            assert_eq!(back.fail(policy(), ME, token, NOW + 62), None);
            assert_eq!(back.succeed(policy(), ME, token, NOW + 62), None);
            assert_eq!(back.give_back(token, NOW + 62), None);
            // Answered, as the next connect would have noted.
            let later = trying.until();
            assert_eq!(trying.leave(policy(), later), trying.recover(policy(), later));
        }
    }
}
