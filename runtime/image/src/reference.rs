//! Names of images, as Docker reads and shows them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::digest::Digest;

/// A text that is not an image name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "`{text}` is not an image name: {reason} (names look like `busybox`, `debian:12` or `registry.example/team/app:1.0`)"
)]
pub struct ReferenceError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// An image name in full: `busybox` is `docker.io/library/busybox:latest`.
///
/// ```
/// let name: mvm_image::Reference = "busybox".parse().unwrap();
/// assert_eq!(name.canonical(), "docker.io/library/busybox:latest");
/// assert_eq!(name.to_string(), "busybox:latest");
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

/// Where Docker looks if a name has no registry.
const REGISTRY: &str = "docker.io";
/// The tag of a name that has neither tag nor digest.
const TAG: &str = "latest";
/// Longest registry and repository together.
const MAX_NAME: usize = 255;
/// Longest tag.
const MAX_TAG: usize = 128;

impl Reference {
    /// The name in full, the form in which the store keeps it.
    pub fn canonical(&self) -> String {
        self.complete(format!("{}/{}", self.registry, self.repository))
    }

    fn complete(&self, mut name: String) -> String {
        for (sign, part) in [(':', &self.tag), ('@', &self.digest)] {
            if let Some(part) = part {
                name.push(sign);
                name.push_str(part);
            }
        }
        name
    }

    /// The manifest that the name asks for, if it has the form `NAME@sha256:...`.
    pub fn digest(&self) -> Option<Digest> {
        self.digest.as_ref()?.parse().ok()
    }

    /// The registry, `docker.io` where the name has none.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The name without registry and repository where they are Docker's defaults, without tag.
    pub fn repository(&self) -> String {
        match (&*self.registry, &*self.repository) {
            (REGISTRY, path) => path.strip_prefix("library/").unwrap_or(path).to_owned(),
            (registry, path) => format!("{registry}/{path}"),
        }
    }

    /// The tag, unless the name has only a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.complete(self.repository()))
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        parse(text)
            .map_err(|reason| ReferenceError { text: text.to_owned(), reason: reason.to_owned() })
    }
}

/// The grammar of Docker's names, by hand: it is parsed for every name in the store at every run,
/// and the customary regular expression takes a tenth of a second to compile.
fn parse(text: &str) -> Result<Reference, &'static str> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    if let Some(digest) = digest {
        check_digest(digest)?;
    }
    // A colon before a slash is that of a port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if is_registry(first) => (first, path),
        _ => (REGISTRY, name),
    };
    check_registry(registry)?;
    if path.is_empty() {
        return Err("the name is empty");
    }
    path.split('/').try_for_each(check_component)?;
    let registry = if registry == "index.docker.io" { REGISTRY } else { registry };
    let repository = match (registry, path.contains('/')) {
        (REGISTRY, false) => format!("library/{path}"),
        _ => path.to_owned(),
    };
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err("it is longer than 255 characters");
    }
    let tag = tag.or(if digest.is_none() { Some(TAG) } else { None });
    Ok(Reference {
        registry: registry.to_owned(),
        repository,
        tag: tag.map(str::to_owned),
        digest: digest.map(str::to_owned),
    })
}

/// What stands before the first slash is a registry if no repository can be called so.
fn is_registry(first: &str) -> bool {
    first.contains(['.', ':'])
        || first == "localhost"
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let port_ok =
        port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    let host_ok = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => {
            !address.is_empty() && address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':')
        }
        None => host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        }),
    };
    if host_ok && port_ok { Ok(()) } else { Err("its registry is not HOST or HOST:PORT") }
}

/// Lower-case letters and digits, with one dot, up to two underscores or any number of hyphens
/// between them.
fn check_component(component: &str) -> Result<(), &'static str> {
    if component.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("a repository has no capital letters");
    }
    let wrong = Err("a repository is made of letters, digits, and single . _ - between them");
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().copied().is_some_and(is_word) || !bytes.last().copied().is_some_and(is_word) {
        return wrong;
    }
    for separator in bytes.split(|b| is_word(*b)).filter(|s| !s.is_empty()) {
        if !matches!(separator, b"." | b"_" | b"__") && !separator.iter().all(|b| *b == b'-') {
            return wrong;
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let ok = (1..=MAX_TAG).contains(&tag.len())
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|b| is_word(b) || b == b'.' || b == b'-');
    if ok { Ok(()) } else { Err("a tag is 1 to 128 letters, digits and _ . -") }
}

fn check_digest(digest: &str) -> Result<(), &'static str> {
    let hex = |digits: &str, len| {
        digits.len() == len
            && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let ok = match digest.split_once(':') {
        Some(("sha256", digits)) => hex(digits, 64),
        Some(("sha512", digits)) => hex(digits, 128),
        _ => false,
    };
    if ok { Ok(()) } else { Err("its digest is not sha256: and 64 hexadecimal digits") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        for (text, canonical, shown) in [
            ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
            ("docker.io/busybox:1", "docker.io/library/busybox:1", "busybox:1"),
            ("team/app", "docker.io/team/app:latest", "team/app:latest"),
            ("localhost:5000/a", "localhost:5000/a:latest", "localhost:5000/a:latest"),
            ("ghcr.io/a/b:v1", "ghcr.io/a/b:v1", "ghcr.io/a/b:v1"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
            ("Reg/a", "Reg/a:latest", "Reg/a:latest"),
            ("dockerDio/l", "dockerDio/l:latest", "dockerDio/l:latest"),
            ("[::1]:5000/a:1", "[::1]:5000/a:1", "[::1]:5000/a:1"),
            ("[fe80::1]/a", "[fe80::1]/a:latest", "[fe80::1]/a:latest"),
            ("a__b/c--d", "docker.io/a__b/c--d:latest", "a__b/c--d:latest"),
            ("a.b_c:T_1.x-", "docker.io/library/a.b_c:T_1.x-", "a.b_c:T_1.x-"),
        ] {
            let name: Reference = text.parse().unwrap();
            assert_eq!(name.canonical(), canonical);
            assert_eq!(name.to_string(), shown);
            assert_eq!(canonical.parse::<Reference>().unwrap(), name);
        }
    }

    #[test]
    fn names_by_digest_have_no_tag() {
        let digest = Digest::of(b"x");
        let name: Reference = format!("busybox@{digest}").parse().unwrap();
        assert_eq!(name.digest(), Some(digest));
        assert_eq!(name.tag(), None);
    }

    #[test]
    fn impossible_names_are_refused() {
        let long = "x".repeat(MAX_NAME);
        for text in [
            "",
            "Busybox",
            "a b",
            "a:",
            "../x",
            "a:b:c/d",
            "/a",
            "a/",
            "a//b",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a._b",
            "ä",
            "a:b/c",
            "a:-x",
            "a@",
            "a@sha256:0",
            "a@md5:00",
            "-.io/a",
            "x.io:/a",
            "x.io:p/a",
            "[::1/a",
            "[]/a",
            "a\nb",
            "a:b\n",
            "localhost/",
            &long,
        ] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        let tag = "t".repeat(MAX_TAG);
        format!("a:{tag}").parse::<Reference>().unwrap();
        format!("a:{tag}t").parse::<Reference>().unwrap_err();
    }
}
