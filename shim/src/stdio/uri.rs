//! Where a standard stream goes, as containerd writes it: a path, or a URI.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// A stream's other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    None,
    /// A fifo, or whatever else is at this path.
    Path(PathBuf),
    /// A regular file that is appended to.
    File(PathBuf),
    /// A program that takes standard output and error.
    Logger {
        /// The program.
        program: PathBuf,
        /// Its arguments.
        args: Vec<OsString>,
    },
}

/// A place that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Another kind of URI.
    #[error("standard streams at {0:?}: there are fifo, file and binary")]
    Scheme(String),
    /// Not from the root.
    #[error("standard streams at {0:?}: the path is not absolute")]
    Relative(String),
    /// `%` without two hexadecimal digits, or a zero byte.
    #[error("standard streams at {0:?}: it holds an escape that means nothing, or a zero byte")]
    Escape(String),
}

impl Place {
    /// Understands containerd's word.
    ///
    /// # Errors
    /// It means nothing.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (scheme, rest) = match text.split_once("://") {
            _ if text.is_empty() => return Ok(Self::None),
            Some((scheme, rest)) if !scheme.contains('/') => (scheme, rest),
            // A path is taken as it is.
            _ if text.contains('\0') => return Err(Error::Escape(text.into())),
            _ if text.starts_with('/') => return Ok(Self::Path(text.into())),
            _ => return Err(Error::Relative(text.into())),
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let decoded = |part: &str, plus| decode(part, plus).ok_or(Error::Escape(text.into()));
        let path = PathBuf::from(decoded(path, false)?);
        if !path.is_absolute() {
            return Err(Error::Relative(text.into()));
        }
        match scheme {
            "fifo" => Ok(Self::Path(path)),
            "file" => Ok(Self::File(path)),
            "binary" => {
                let mut args = Vec::new();
                for pair in query.split('&').filter(|p| !p.is_empty()) {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    args.push(decoded(key, true)?);
                    if !value.is_empty() {
                        args.push(decoded(value, true)?);
                    }
                }
                Ok(Self::Logger { program: path, args })
            }
            _ => Err(Error::Scheme(text.into())),
        }
    }
}

/// Percent-decoding (RFC 3986, 2.1); in a query `+` is a space.
fn decode(text: &str, plus: bool) -> Option<OsString> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b'+' if plus => b' ',
            other => other,
        });
    }
    if bytes.contains(&0) { None } else { Some(OsString::from_vec(bytes)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_understood() {
        assert_eq!(Place::parse(""), Ok(Place::None));
        assert_eq!(Place::parse("/run/a b%41"), Ok(Place::Path("/run/a b%41".into())));
        assert_eq!(Place::parse("fifo:///run/a%20b"), Ok(Place::Path("/run/a b".into())));
        assert_eq!(Place::parse("file:///tmp/x"), Ok(Place::File("/tmp/x".into())));
        let args = ["--id", "a b", "flag"].map(OsString::from).to_vec();
        assert_eq!(
            Place::parse("binary:///bin/log?--id=a+b&flag"),
            Ok(Place::Logger { program: "/bin/log".into(), args })
        );
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for text in ["run/x", "file://x", "http:///x", "file:///a%4", "file:///a%zz", "file:///%00"]
        {
            assert!(Place::parse(text).is_err(), "{text}");
        }
    }
}
