//! The user that commands run as.

use std::fs;

/// Where users are listed (passwd(5)). Those that only a directory service knows are given by number.
const USERS: &str = "/etc/passwd";

/// A user, and its own group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Account {
    /// As it was written.
    pub name: String,
    /// Not 0.
    pub uid: u32,
    /// Of its own group.
    pub gid: u32,
}

impl Account {
    /// Who it is when nothing is said.
    pub const DEFAULT: &'static str = "nobody";

    /// By name or number.
    ///
    /// # Errors
    ///
    /// Why not, for people.
    pub fn find(name: &str) -> Result<Self, String> {
        let users = fs::read(USERS).map_err(|error| format!("{USERS}: {error}"))?;
        Self::find_in(&String::from_utf8_lossy(&users), name)
    }

    fn find_in(users: &str, name: &str) -> Result<Self, String> {
        let number = name.parse::<u32>().ok();
        let listed = users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (user, _, uid, gid) =
                (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
            (user == name || number == Some(uid)).then_some((uid, gid))
        });
        let (uid, gid) = listed
            .or(number.map(|number| (number, number)))
            .ok_or_else(|| format!("there is no user {name} in {USERS}"))?;
        if uid == 0 || gid == 0 {
            return Err(format!("{name} is root, or in its group, who may do everything"));
        }
        Ok(Self { name: name.to_owned(), uid, gid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "root:x:0:0:root:/root:/bin/bash\n\
                          # no user:\n\
                          checks:x:990:991::/:/usr/sbin/nologin\n\
                          wheel:x:5:0::/:/bin/sh\n\
                          broken:x:\n";

    fn find(name: &str) -> Result<(u32, u32), String> {
        Account::find_in(LISTED, name).map(|account| (account.uid, account.gid))
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        assert_eq!(find("checks"), Ok((990, 991)));
        assert_eq!(find("990"), Ok((990, 991)));
        assert_eq!(find("1234"), Ok((1234, 1234)), "whom only a directory service knows");
        for (name, why) in
            [("root", "root"), ("0", "root"), ("wheel", "root"), ("broken", "no user"), ("x", "no")]
        {
            let error = find(name).expect_err(name);
            assert!(error.contains(why), "{error}");
        }
    }
}
