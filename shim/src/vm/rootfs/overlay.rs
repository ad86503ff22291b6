//! Overlays of so many layers that their paths do not fit into mount(2)'s one page.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::{Error, MAX_DATA};
use crate::backend::RootMount;

/// Mounts from the directory that all layers share, so that their paths are short.
pub(super) fn mount_from_near(
    one: &RootMount,
    at: &Path,
    flags: MsFlags,
    data: &[String],
) -> Result<(), Error> {
    let long = data.join(",");
    let too_long = || Error::TooLong { kind: one.kind.clone(), len: long.len() };
    let (dir, near) = shortened(data).ok_or_else(too_long)?;
    if near.len() > MAX_DATA {
        return Err(too_long());
    }
    let work = || -> Result<(), Errno> {
        // A directory of this thread's own.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(&dir)?;
        let (source, kind) = (Some(one.source.as_str()), Some(one.kind.as_str()));
        mount(source, at, kind, flags, Some(near.as_str()))
    };
    let mounted = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mount".into()).spawn_scoped(scope, work);
        thread.map(|t| t.join().unwrap_or(Err(Errno::EIO)))
    });
    let (kind, from) = (one.kind.clone(), one.source.clone());
    mounted.map_err(Error::Thread)?.map_err(|source| Error::Mount {
        kind,
        from,
        at: at.to_owned(),
        source,
    })
}

/// An overlay's options with the layers' paths relative to the directory that they share.
fn shortened(data: &[String]) -> Option<(PathBuf, String)> {
    const LOWER: &str = "lowerdir=";
    let layers: Vec<&Path> =
        data.iter().find_map(|o| o.strip_prefix(LOWER))?.split(':').map(Path::new).collect();
    let mut dir = layers.first()?.parent()?;
    while !layers.iter().all(|layer| layer.starts_with(dir)) {
        dir = dir.parent()?;
    }
    let relative: Option<Vec<&str>> =
        layers.iter().map(|l| l.strip_prefix(dir).ok()?.to_str()).collect();
    let lower = format!("{LOWER}{}", relative?.join(":"));
    let words: Vec<&str> = data
        .iter()
        .map(|o| if o.starts_with(LOWER) { lower.as_str() } else { o.as_str() })
        .collect();
    let absolute = dir.as_os_str() != OsStr::new("") && dir.is_absolute();
    absolute.then(|| (dir.to_owned(), words.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(',').map(String::from).collect()
    }

    #[test]
    fn paths_of_many_layers_are_shortened() {
        let data = words("workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/1/fs:/s/2/fs");
        let (dir, short) = shortened(&data).unwrap();
        assert_eq!(dir, Path::new("/s"));
        assert_eq!(short, "workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=1/fs:2/fs");
        assert!(shortened(&words("workdir=/w")).is_none());
    }
}
