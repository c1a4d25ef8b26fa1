//! The same rules with plain fields, one after another.

use super::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Who {
    Nobody,
    One(u16),
    Several,
}

impl Who {
    pub(super) fn client(self) -> Client {
        match self {
            Self::Nobody => Client::NOBODY,
            Self::One(tag) => Client(tag),
            Self::Several => Client::SEVERAL,
        }
    }
}

/// What a policy says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) failures: u8,
    pub(super) base: u32,
    pub(super) max: u32,
}

impl Rules {
    pub(super) fn policy(self) -> Policy {
        Policy::new(self.failures, self.base, self.max, 50)
    }

    /// The first time, doubled for each ejection that came before this one, at most the longest;
    /// that from the fifteenth on. Never no time at all.
    pub(super) fn duration(self, level: u64) -> u64 {
        if level == 15 {
            return u64::from(self.max.max(1));
        }
        let (mut duration, max) = (u128::from(self.base), u128::from(self.max));
        for _ in 1..level {
            duration *= 2;
        }
        u64::try_from(duration.min(max).max(1)).expect("at most a u32")
    }
}

/// The fields of an [`Ejection`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plain {
    pub(super) phase: Phase,
    pub(super) failures: u64,
    pub(super) level: u64,
    pub(super) who: Who,
    pub(super) until: u64,
}

impl Plain {
    pub(super) const NONE: Self =
        Self { phase: Phase::In, failures: 0, level: 0, who: Who::Nobody, until: 0 };

    pub(super) fn packed(self) -> Ejection {
        Ejection::new(self.phase, self.failures, self.level, self.who.client(), self.until)
    }

    pub(super) fn is_out_for(self, client: u16) -> bool {
        let alone = matches!(self.phase, Phase::Suspected | Phase::SuspectTry);
        self.phase != Phase::In && (!alone || self.who == Who::One(client))
    }

    pub(super) fn is_out_for_anybody(self) -> bool {
        self.phase != Phase::In
    }

    pub(super) fn is_try(self) -> bool {
        matches!(self.phase, Phase::SuspectTry | Phase::Trying)
    }

    pub(super) fn admits(self, client: u16, now: u64) -> Admission {
        match (self.is_out_for(client), now >= self.until) {
            (false, _) => Admission::In,
            (true, true) if self.is_try() => Admission::Answered,
            (true, true) => Admission::Try,
            (true, false) => Admission::Out,
        }
    }

    pub(super) fn token(self) -> Token {
        if self.is_try() { Token(self.until) } else { Token::NONE }
    }

    pub(super) fn is_of(self, token: Token) -> bool {
        self.is_try() && token != Token::NONE && token == self.token()
    }

    pub(super) fn goes(&mut self, phase: Phase, rules: Rules, now: u64) {
        self.phase = phase;
        self.until = now + rules.duration(self.level);
    }

    /// What is known of the time before, it no longer counts.
    pub(super) fn forget(&mut self, now: u64) {
        if now >= self.until {
            (self.failures, self.level) = (0, 0);
        }
    }

    pub(super) fn take(&mut self, now: u64) {
        let alone = matches!(self.phase, Phase::Suspected | Phase::SuspectTry);
        self.phase = if alone { Phase::SuspectTry } else { Phase::Trying };
        self.until = now + ANSWERED;
    }

    pub(super) fn recover(&mut self, rules: Rules, now: u64) {
        (self.failures, self.who) = (0, Who::Nobody);
        self.goes(Phase::In, rules, now);
    }

    pub(super) fn fail(&mut self, rules: Rules, client: u16, token: Token, now: u64) {
        let others = self.who != Who::One(client);
        if self.phase == Phase::SuspectTry && others && now >= self.until {
            // It was answered then.
            *self = Self::NONE;
        }
        if self.phase == Phase::Suspected && others && now >= self.until + LAPSE {
            // Nobody knows any more.
            *self = Self::NONE;
        }
        let alone = matches!(self.phase, Phase::Suspected | Phase::SuspectTry);
        if self.phase == Phase::In {
            self.forget(now);
            self.who = match self.who {
                Who::One(who) if self.failures > 0 && who != client => Who::Several,
                Who::Several | Who::Nobody if self.failures > 0 => Who::Several,
                _ => Who::One(client),
            };
            self.failures = (self.failures + 1).min(127);
            if rules.failures > 0 && self.failures >= u64::from(rules.failures) {
                self.level = (self.level + 1).min(15);
                let several = self.who == Who::Several;
                self.goes(if several { Phase::Ejected } else { Phase::Suspected }, rules, now);
            } else {
                self.until = now + u64::from(rules.max);
            }
        } else if alone && others {
            if rules.failures > 0 {
                self.failures = (self.failures + 1).min(127);
                if self.failures >= (2 * u64::from(rules.failures)).min(127) {
                    (self.failures, self.who) = (rules.failures.into(), Who::Several);
                    self.goes(Phase::Ejected, rules, now);
                }
            }
        } else if self.is_of(token) {
            self.level = (self.level + 1).min(15);
            self.goes(if alone { Phase::Suspected } else { Phase::Ejected }, rules, now);
        }
    }

    pub(super) fn succeed(&mut self, rules: Rules, client: u16, token: Token, now: u64) {
        let concerned = self.who == Who::One(client) || self.who == Who::Several;
        if self.phase == Phase::In && self.failures > 0 && concerned {
            (self.failures, self.who) = (0, Who::Nobody);
        } else if self.is_of(token) {
            self.recover(rules, now);
        } else if matches!(self.phase, Phase::Suspected | Phase::SuspectTry)
            && self.who != Who::One(client)
        {
            // What others saw begins anew.
            self.failures = self.failures.min(rules.failures.into());
        }
    }

    pub(super) fn give_back(&mut self, token: Token, now: u64) {
        if self.is_of(token) {
            let alone = self.phase == Phase::SuspectTry;
            self.phase = if alone { Phase::Suspected } else { Phase::Ejected };
            self.until = now;
        }
    }

    pub(super) fn confirm(&mut self, rules: Rules, now: u64) {
        match self.phase {
            Phase::Suspected if self.until <= now => {
                self.who = Who::Several;
                self.goes(Phase::Ejected, rules, now);
            }
            Phase::Suspected => (self.who, self.phase) = (Who::Several, Phase::Ejected),
            Phase::SuspectTry if self.until > now => {
                (self.who, self.phase) = (Who::Several, Phase::Trying);
            }
            _ => {}
        }
    }

    pub(super) fn spare(&mut self, rules: Rules, now: u64) {
        self.failures = self.failures.min(u64::from(rules.failures.saturating_sub(1)));
        self.until = now + u64::from(rules.max);
    }

    pub(super) fn come_back(&mut self, rules: Rules, now: u64) {
        match self.phase {
            Phase::In => self.spare(rules, now),
            Phase::SuspectTry => self.goes(Phase::Suspected, rules, now),
            _ => {}
        }
    }
}
