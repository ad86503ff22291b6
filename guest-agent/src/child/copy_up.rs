//! The mount option "tmpcopyup": a new tmpfs starts with what it covers.

use std::fs::{self, FileType, Metadata, Permissions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, mknodat};

use crate::error::{Context, Result};

/// Copies all that is in the directory `from` to the root of the detached mount `to`, with owners
/// and modes (extended attributes and times are not kept). The root itself gets the directory's
/// unless its mode was chosen.
///
/// Nothing runs in the container yet: what is a directory stays one, so paths below these two
/// descriptors are safe as long as no link is followed.
pub fn copy_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>, has_mode: bool) -> Result<()> {
    let path = |fd: BorrowedFd<'_>| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let (from, to) = (path(from), path(to));
    // The links in /proc are the only ones to follow.
    let top = fs::metadata(&from).context(|| "tmpcopyup".into())?;
    if !has_mode {
        let mode = Permissions::from_mode(top.mode() & 0o7777);
        std::os::unix::fs::chown(&to, Some(top.uid()), Some(top.gid()))
            .and_then(|()| fs::set_permissions(&to, mode))
            .context(|| "tmpcopyup".into())?;
    }
    // No recursion: an image may nest directories deeply.
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        let list = fs::read_dir(from.join(&directory))
            .context(|| format!("tmpcopyup: read {:?}", directory.display()))?;
        for entry in list {
            let entry = entry.context(|| "tmpcopyup".into())?;
            let below = directory.join(entry.file_name());
            let kind = copy(&entry.path(), &to.join(&below))
                .context(|| format!("tmpcopyup: copy {:?}", below.display()))?;
            if kind.is_dir() {
                directories.push(below);
            }
        }
    }
    Ok(())
}

/// Copies one entry, of a directory only itself.
fn copy(from: &Path, to: &Path) -> io::Result<FileType> {
    let found = fs::symlink_metadata(from)?;
    let kind = found.file_type();
    if kind.is_dir() {
        fs::create_dir(to)?;
    } else if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else if kind.is_file() {
        fs::copy(from, to)?;
    } else {
        make_node(&found, to)?;
    }
    lchown(to, Some(found.uid()), Some(found.gid()))?;
    if !kind.is_symlink() {
        // After the owner, whose change clears set-user-id bits.
        fs::set_permissions(to, Permissions::from_mode(found.mode() & 0o7777))?;
    }
    Ok(kind)
}

fn make_node(like: &Metadata, to: &Path) -> io::Result<()> {
    let kind = like.file_type();
    let node = match () {
        () if kind.is_fifo() => rustix::fs::FileType::Fifo,
        () if kind.is_socket() => rustix::fs::FileType::Socket,
        () if kind.is_char_device() => rustix::fs::FileType::CharacterDevice,
        () => rustix::fs::FileType::BlockDevice,
    };
    Ok(mknodat(CWD, to, node, Mode::from_raw_mode(0o600), like.rdev())?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_tree_is_copied_without_following_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |path: &str| from.path().join(path);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/file"), "text").unwrap();
        fs::set_permissions(at("a/b/file"), Permissions::from_mode(0o4751)).unwrap();
        symlink("/etc", at("link")).unwrap();
        mknodat(CWD, at("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        fs::set_permissions(from.path(), Permissions::from_mode(0o711)).unwrap();

        let open = |path: &Path| fs::File::open(path).unwrap();
        copy_up(open(from.path()).as_fd(), open(to.path()).as_fd(), false).unwrap();
        let copied = |path: &str| fs::symlink_metadata(to.path().join(path)).unwrap();
        assert_eq!(fs::read(to.path().join("a/b/file")).unwrap(), b"text");
        assert_eq!(copied("a/b/file").mode() & 0o7777, 0o4751);
        assert!(copied("link").is_symlink() && copied("pipe").file_type().is_fifo());
        assert_eq!(copied("").mode() & 0o777, 0o711);
    }
}
