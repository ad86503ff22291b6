//! The door to a guest's sockets, for machines without an agent: a unix socket at a path of the user's.
//!
//! Who connects to it says `CONNECT PORT` and is led to that port of the guest; what the guest connects to is the
//! unix socket at the same path with `_PORT` after it. Other monitors of small machines do the same. What is at
//! the path is written down in the sandbox's directory, so that whoever finds it without its owner removes it.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use mvm_vmm::config::MAX_DIAL_NAME;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::socket;

/// Name of the file in the sandbox's directory that says what has to be removed.
const FILE: &str = "vsock.json";

/// The door, open.
#[derive(Debug)]
pub(crate) struct Door {
    /// Where host processes ask for the guest.
    pub listener: UnixListener,
    /// Where the sockets are that the guest asks for, and what their names begin with.
    pub directory: OwnedFd,
    pub name: String,
}

/// A socket that was made.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Record {
    fn of(path: &Path) -> io::Result<Self> {
        let about = fs::symlink_metadata(path)?;
        if !about.file_type().is_socket() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self { path: path.into(), device: about.dev(), inode: about.ino() })
    }
}

/// Makes the socket at `path`, and writes it down in `dir`.
///
/// # Errors
/// There is something already, its directory is missing, or its name is too long for what is added to it.
pub(crate) fn open(dir: &Path, path: &Path) -> Result<Door, Error> {
    let failed = |reason: io::Error| Error::Vsock { path: path.into(), reason };
    let invalid = |why: String| failed(io::Error::new(io::ErrorKind::InvalidInput, why));
    let path = std::path::absolute(path).map_err(failed)?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(invalid("it is a directory".into()));
    };
    let name = name.to_str().ok_or_else(|| invalid("its name is not UTF-8".into()))?;
    if name.len() > MAX_DIAL_NAME {
        return Err(invalid(format!("its name is longer than {MAX_DIAL_NAME} bytes")));
    }
    let directory = File::open(parent).map_err(failed)?;
    let listener = socket::bind(&path).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => io::Error::new(e.kind(), "it exists already"),
        _ => e,
    });
    let listener = listener.map_err(failed)?;
    // Only now is it known which file has to be removed, so that one is left behind by a process that is killed
    // between these two lines.
    let record = Record::of(&path).and_then(|record| {
        fs::write(dir.join(FILE), serde_json::to_vec(&record)?)?;
        Ok(record)
    });
    if let Err(e) = record {
        let _ = fs::remove_file(&path);
        return Err(failed(e));
    }
    Ok(Door { listener, directory: directory.into(), name: name.to_owned() })
}

/// Removes the socket that [`open`] made for the sandbox in `dir`, if there is one and it is still that.
pub(crate) fn tear_down(dir: &Path) -> io::Result<()> {
    let file = dir.join(FILE);
    let bytes = match fs::read(&file) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let record: Record = serde_json::from_slice(&bytes)?;
    if Record::of(&record.path).is_ok_and(|found| found == record) {
        fs::remove_file(&record.path)?;
    }
    fs::remove_file(&file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_socket_is_removed_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        tear_down(dir.path()).unwrap();
        let door = open(dir.path(), &path).unwrap();
        assert_eq!(door.name, "v.sock");
        assert!(matches!(open(dir.path(), &path), Err(Error::Vsock { .. })));
        tear_down(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let _door = open(dir.path(), &path).unwrap();
        // Somebody else's, of the same name. It is made before the old one is gone, or it could have its number.
        let other = dir.path().join("other");
        let _other = UnixListener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        tear_down(dir.path()).unwrap();
        assert!(path.exists());
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn places_that_cannot_be_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |path: &Path| open(dir.path(), path).unwrap_err().to_string();
        assert!(refused(Path::new("/")).contains("a directory"));
        assert!(refused(&dir.path().join("no/such")).contains("No such file"));
        assert!(refused(&dir.path().join("x".repeat(65))).contains("longer than 64"));
        fs::write(dir.path().join("file"), "precious").unwrap();
        assert!(refused(&dir.path().join("file")).contains("exists already"));
        tear_down(dir.path()).unwrap();
        assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"precious");
    }
}
