//! Kernel parameters of the container's namespaces (linux.sysctl).

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use crate::error::{Context, Error, Result};

/// The file of a parameter: dots are slashes, and slashes are the dots of names that contain some
/// (`net.ipv4.conf.eth0/100.forwarding`), unless the first separator is a slash already.
pub fn path(key: &str) -> Result<PathBuf> {
    let dots_first = key.find(['.', '/']).is_none_or(|at| key.as_bytes()[at] == b'.');
    let swapped: String = if dots_first {
        key.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    } else {
        key.into()
    };
    let harmless = !swapped.contains('\0')
        && swapped.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if !harmless {
        return Err(Error::Invalid(format!("linux.sysctl: {key:?} is no kernel parameter")));
    }
    Ok(PathBuf::from("/proc/sys").join(swapped))
}

/// Sets all of them in the namespaces of this process.
pub fn set_all(parameters: &HashMap<String, String>) -> Result<()> {
    for (key, value) in parameters {
        // Without creating: a missing one would be "permission denied".
        std::fs::OpenOptions::new()
            .write(true)
            .open(path(key)?)
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .context(|| format!("linux.sysctl: {key}={value}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn keys_become_paths() {
        for (key, file) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("net/ipv4/ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            ("net.ipv4.conf.eth0/100.forwarding", "/proc/sys/net/ipv4/conf/eth0.100/forwarding"),
        ] {
            assert_eq!(path(key).unwrap(), Path::new(file));
        }
    }

    #[test]
    fn keys_that_leave_the_directory_are_refused() {
        for key in ["", "..", "kernel/../../../etc/passwd", "a..b", "/etc/passwd", "a\0b"] {
            assert!(path(key).is_err(), "{key:?} became {:?}", path(key));
        }
    }
}
