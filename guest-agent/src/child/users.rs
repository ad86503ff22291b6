//! Who the process runs as. Names are resolved in the container's own /etc/passwd and /etc/group,
//! which an attacker may have written: they are parsed as bytes, bounded, and nothing in them is
//! trusted to be well-formed.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use oci_spec::runtime::User;

use crate::error::{Error, Result};

/// Of a user or group file no more is read, bytes.
const MAX_FILE: u64 = 4 << 20;

/// The identity of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The home directory of the user file, if it has one for the user.
    pub home: Option<String>,
}

/// Resolves the specification's user inside of the container's root, which is the current root.
///
/// `user.username` holds what an image's configuration may say: `user`, `uid`, `user:group`,
/// `uid:gid` and mixtures. It is only looked at if it is not empty.
pub fn resolve(user: &User) -> Result<Identity> {
    let passwd = read_file(Path::new("/etc/passwd"));
    let name = user.username().as_deref().unwrap_or_default();
    let extra = user.additional_gids().as_deref().unwrap_or_default();
    if name.is_empty() {
        let home = entries(&passwd).find(|e| e.uid() == Some(user.uid())).and_then(|e| e.home());
        return checked(Identity {
            uid: user.uid(),
            gid: user.gid(),
            groups: extra.to_vec(),
            home,
        });
    }
    let group = read_file(Path::new("/etc/group"));
    let mut identity = resolve_name(name, &passwd, &group)?;
    identity.groups.extend_from_slice(extra);
    checked(identity)
}

/// The id -1 means "as it is" to the kernel: asked for, it would leave the process what it is now,
/// root.
fn checked(identity: Identity) -> Result<Identity> {
    let no_id =
        |field: &str| Err(Error::Invalid(format!("process.user{field}: {} is no id", u32::MAX)));
    match &identity {
        Identity { uid: u32::MAX, .. } => no_id(".uid"),
        Identity { gid: u32::MAX, .. } => no_id(".gid"),
        Identity { groups, .. } if groups.contains(&u32::MAX) => no_id(".additionalGids"),
        _ => Ok(identity),
    }
}

/// Resolves `user[:group]` with the contents of the two files.
fn resolve_name(name: &str, passwd: &[u8], group: &[u8]) -> Result<Identity> {
    let (user, group_name) = match name.split_once(':') {
        Some((user, group_name)) => (user, Some(group_name).filter(|g| !g.is_empty())),
        None => (name, None),
    };
    // An empty user part (":group") is root, as container engines have it.
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = entries(passwd)
        .find(|e| e.name() == user.as_bytes())
        .or_else(|| entries(passwd).find(|e| number.is_some() && e.uid() == number));
    let uid = match (entry.as_ref().and_then(Entry::uid), number) {
        (Some(uid), _) | (None, Some(uid)) => uid,
        (None, None) => {
            return Err(Error::Invalid(format!(
                "process.user: there is no user {user:?} in the container's /etc/passwd"
            )));
        }
    };
    let (gid, groups) = match group_name {
        Some(wanted) => (resolve_group(wanted, group)?, Vec::new()),
        None => {
            let gid = entry.as_ref().and_then(Entry::gid).unwrap_or(0);
            let member = entry.as_ref().map_or(user.as_bytes(), Entry::name);
            (gid, entries(group).filter(|g| g.has_member(member)).filter_map(|g| g.uid()).collect())
        }
    };
    Ok(Identity { uid, gid, groups, home: entry.and_then(|e| e.home()) })
}

fn resolve_group(wanted: &str, group: &[u8]) -> Result<u32> {
    let number = wanted.parse::<u32>().ok();
    entries(group)
        .find(|g| g.name() == wanted.as_bytes())
        .and_then(|g| g.uid())
        .or(number)
        .ok_or_else(|| {
            Error::Invalid(format!(
                "process.user: there is no group {wanted:?} in the container's /etc/group"
            ))
        })
}

/// One line of either file. In both the third field is the id.
#[derive(Debug, Clone)]
struct Entry<'a> {
    fields: Vec<&'a [u8]>,
}

fn entries(file: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    file.split(|b| *b == b'\n')
        .map(|line| Entry { fields: line.splitn(8, |b| *b == b':').collect() })
        .filter(|entry| entry.fields.len() >= 3 && !entry.name().is_empty())
}

impl<'a> Entry<'a> {
    fn field(&self, n: usize) -> &'a [u8] {
        self.fields.get(n).copied().unwrap_or_default().trim_ascii()
    }

    fn name(&self) -> &'a [u8] {
        self.field(0)
    }

    fn number(&self, n: usize) -> Option<u32> {
        std::str::from_utf8(self.field(n)).ok()?.parse().ok()
    }

    fn uid(&self) -> Option<u32> {
        self.number(2)
    }

    fn gid(&self) -> Option<u32> {
        self.number(3)
    }

    fn home(&self) -> Option<String> {
        let home = std::str::from_utf8(self.field(5)).ok()?;
        (home.starts_with('/') && !home.contains('\0')).then(|| home.into())
    }

    fn has_member(&self, name: &[u8]) -> bool {
        self.field(3).split(|b| *b == b',').any(|member| member.trim_ascii() == name)
    }
}

/// The file's content; nothing if it is not there, not a plain file or not readable.
fn read_file(path: &Path) -> Vec<u8> {
    let mut content = Vec::new();
    // Not to hang on a FIFO, nor to make a terminal ours.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path);
    if let Ok(file) = file
        && file.metadata().is_ok_and(|m| m.is_file())
    {
        // What a failing disk does not give is as good as not there.
        let _ = file.take(MAX_FILE).read_to_end(&mut content);
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        app:x:1000:1001:App:/home/app:/bin/sh\n\
        # comment\n\
        :x:7:7::/:\n\
        broken\n\
        neg:x:-1:5::/:\n\
        big:x:4294967296:5::/:\n\
        1234:x:77:78::/numeric-name:\n\
        bin\xff:x:9:9::/:\n";
    const GROUP: &[u8] =
        b"root:x:0:\nwheel:x:10:root,app\nvideo:x:44: app ,x\napps:x:1001:\nbad:x::app\n";

    fn resolved(name: &str) -> (u32, u32, Vec<u32>) {
        let id = resolve_name(name, PASSWD, GROUP).unwrap();
        (id.uid, id.gid, id.groups)
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(resolved("app"), (1000, 1001, vec![10, 44]));
        assert_eq!(resolved("1000"), (1000, 1001, vec![10, 44]));
        assert_eq!(resolved("app:wheel"), (1000, 10, vec![]));
        assert_eq!(resolved("app:5"), (1000, 5, vec![]));
        assert_eq!(resolved("5000"), (5000, 0, vec![]));
        assert_eq!(resolved("5000:6000"), (5000, 6000, vec![]));
        assert_eq!(resolved(":wheel"), (0, 10, vec![]));
        assert_eq!(resolved("app:"), (1000, 1001, vec![10, 44]));
        assert_eq!(resolved("1234"), (77, 78, vec![]), "a name of digits is a name first");
    }

    #[test]
    fn home_comes_from_the_entry() {
        let home = |name| resolve_name(name, PASSWD, GROUP).unwrap().home;
        assert_eq!(home("app").as_deref(), Some("/home/app"));
        assert_eq!(home("5000"), None);
    }

    #[test]
    fn unknown_names_are_named() {
        for (name, what) in [("nobody", "user \"nobody\""), ("app:nogroup", "group \"nogroup\"")] {
            let error = resolve_name(name, PASSWD, GROUP).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn malformed_numbers_are_no_ids() {
        for name in ["neg", "big"] {
            assert!(resolve_name(name, PASSWD, GROUP).is_err(), "{name}");
        }
    }

    #[test]
    fn the_id_that_means_no_change_is_no_id() {
        let id = |uid, gid, groups| Identity { uid, gid, groups, home: None };
        assert!(checked(id(u32::MAX - 1, 0, vec![0])).is_ok());
        for bad in [id(u32::MAX, 0, vec![]), id(0, u32::MAX, vec![]), id(0, 0, vec![0, u32::MAX])] {
            assert!(matches!(checked(bad), Err(Error::Invalid(_))));
        }
    }

    #[test]
    fn any_bytes_are_survived() {
        let mut noise = 12345_u32;
        for len in 0..300 {
            let file: Vec<u8> = (0..len)
                .map(|_| {
                    noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b"a:0,\n\xff \0"[(noise >> 24) as usize % 8]
                })
                .collect();
            let _ = resolve_name("a", &file, &file);
        }
    }
}
