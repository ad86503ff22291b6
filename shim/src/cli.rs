//! The command line, in the form of Go's `flag` package, since it is containerd that writes it.

use std::ffi::OsString;
use std::path::PathBuf;

/// What containerd says on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's own socket.
    pub address: String,
    /// The bundle, for `delete`.
    pub bundle: Option<PathBuf>,
    /// Where the server listens; it is handed over open, and removed at the end.
    pub socket: Option<PathBuf>,
    /// More is written to the log.
    pub debug: bool,
    /// Only the version is wanted.
    pub version: bool,
    /// `start`, `delete`, or nothing: then this is the server.
    pub action: String,
}

/// A command line that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such flag.
    #[error("{0:?} is no flag of a shim")]
    Unknown(String),
    /// A flag without its value.
    #[error("-{0} needs a value")]
    Missing(String),
    /// A value that is no text.
    #[error("{0:?} is no text")]
    Text(OsString),
    /// It has to be there and cannot be anything.
    #[error("-{0} is {1:?}; containerd gives letters, digits, '.', '_' and '-'")]
    Identifier(&'static str, String),
}

impl Flags {
    /// Understands the arguments after the program's name.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let mut flags = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let arg = arg.into_string().map_err(Error::Text)?;
            let Some(flag) = arg.strip_prefix('-') else {
                flags.action = arg;
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let is_set = value.as_deref().is_none_or(|v| matches!(v, "true" | "1"));
            match name {
                "debug" => flags.debug = is_set,
                "v" => flags.version = is_set,
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" => {
                    let value = match value {
                        Some(value) => value,
                        None => match args.next() {
                            Some(value) => value.into_string().map_err(Error::Text)?,
                            None => return Err(Error::Missing(name.to_owned())),
                        },
                    };
                    match name {
                        "namespace" => flags.namespace = value,
                        "id" => flags.id = value,
                        "address" => flags.address = value,
                        "bundle" => flags.bundle = Some(value.into()),
                        "socket" => flags.socket = Some(value.into()),
                        // Events go over ttrpc alone.
                        _ => {}
                    }
                }
                _ => return Err(Error::Unknown(arg)),
            }
        }
        Ok(flags)
    }

    /// Checks what becomes part of paths and names.
    ///
    /// # Errors
    /// The namespace or the id cannot be one.
    pub fn check(&self) -> Result<(), Error> {
        for (name, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if !is_identifier(value) {
                return Err(Error::Identifier(name, value.clone()));
            }
        }
        Ok(())
    }
}

/// containerd's rule for identifiers, with a little more room.
pub fn is_identifier(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=128).contains(&text.len())
        && text.bytes().all(good)
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, Error> {
        Flags::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_lines_are_understood() {
        let flags = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary \
             /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        flags.check().unwrap();
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("k8s.io", "c1"));
        assert_eq!(flags.address, "/run/containerd/containerd.sock");
        assert!(flags.debug);
        assert_eq!(flags.action, "start");
        let flags = parse("--namespace=n -id=c -bundle /b delete").unwrap();
        assert_eq!(flags.bundle, Some("/b".into()));
        assert_eq!(flags.action, "delete");
        assert!(parse("-v").unwrap().version);
        assert!(!parse("-debug=false").unwrap().debug);
    }

    #[test]
    fn what_means_nothing_is_refused() {
        assert_eq!(parse("-bogus start"), Err(Error::Unknown("-bogus".into())));
        assert_eq!(parse("-id"), Err(Error::Missing("id".into())));
        for line in ["-namespace ../x -id c", "-namespace n -id a/b", "-id c", "-namespace n"] {
            assert!(parse(line).unwrap().check().is_err(), "{line}");
        }
    }
}
