//! Directories and files of the host in the container: `-v` and `--mount`, with docker's meaning.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use mvm_fs::follow::{can_be_followed, follow};
use mvm_fs::tree::{Extent, TreeError};
use mvm_fs::{Cache, NewShare, ShareOptions, Source};

use super::{Error, Tmpfs};

/// Why mounts do not go the other way.
const SHARED: &str = "what is mounted in a guest is mounted in no other kernel: there is rslave, for what the host mounts, and no rshared";

/// A directory or file of the host that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub target: String,
    /// The container may not write.
    pub read_only: bool,
    /// A directory is made where there is nothing (`-v`; `--mount` refuses).
    pub create: bool,
    /// What the host mounts below the source later is seen in the container (`rslave`).
    pub follow: bool,
}

/// What a `-v` or `--mount` asks for, and what of it means nothing here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked<T> {
    /// The mount.
    pub mount: T,
    /// One sentence for each word that was ignored.
    pub notices: Vec<String>,
}

/// What `--mount` can ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mount {
    /// `type=bind`.
    Bind(Bind),
    /// `type=tmpfs`.
    Tmpfs(Tmpfs),
}

/// A bind whose source is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Name of the share, and of the volume in the guest.
    pub name: String,
    /// What is shared.
    pub bind: Bind,
    /// It is no directory.
    pub file: bool,
}

impl Volume {
    /// The share that the file server is to make of it.
    ///
    /// # Errors
    /// The host's mounts cannot be followed.
    pub fn share(&self) -> Result<NewShare, TreeError> {
        let bind = &self.bind;
        let options = ShareOptions { read_only: bind.read_only, cache: Cache::Live };
        let source = if bind.follow && !self.file {
            let extent = Extent::whole(bind.read_only);
            Source::Tree(follow(&bind.source, extent, Path::new("/proc/self/exe"))?)
        } else {
            Source::Path(bind.source.clone())
        };
        Ok(NewShare { name: self.name.clone(), source, options })
    }
}

/// `-v SOURCE:TARGET[:OPTIONS]`.
pub fn parse_volume(text: &str) -> Result<Asked<Bind>, Error> {
    let invalid =
        |rule: &str| Error::Invalid { what: "volume", value: text.into(), rule: rule.into() };
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, words) = match parts[..] {
        [_] => {
            return Err(invalid(
                "write SOURCE:TARGET; there are no volumes without a place on the host, --tmpfs mounts memory",
            ));
        }
        [source, target] => (source, target, ""),
        [source, target, words] => (source, target, words),
        _ => return Err(invalid("write SOURCE:TARGET[:OPTIONS]")),
    };
    let source = source_path(source).map_err(|rule| invalid(&rule))?;
    check_target(target).map_err(|rule| invalid(&rule))?;
    let (read_only, create, follow) = (false, true, false);
    let mut bind = Bind { source, target: target.into(), read_only, create, follow };
    let mut notices = Vec::new();
    for word in words.split(',').filter(|w| !w.is_empty()) {
        match word {
            "ro" => bind.read_only = true,
            "rw" => bind.read_only = false,
            "z" | "Z" => notices.push(format!(
                "--volume {text}: {word:?} is ignored, the guest has no SELinux labels"
            )),
            // What docker's defaults amount to here in any case.
            "rprivate" | "private" | "nocopy" | "cached" | "delegated" | "consistent" => {}
            "slave" | "rslave" => bind.follow = true,
            "shared" | "rshared" => return Err(invalid(SHARED)),
            _ => {
                return Err(invalid(&format!(
                    "unknown option {word:?}: there are ro, rw, z and Z"
                )));
            }
        }
    }
    Ok(Asked { mount: bind, notices })
}

/// `--mount type=bind|tmpfs,KEY=VALUE,...`.
pub fn parse_mount(text: &str) -> Result<Asked<Mount>, Error> {
    let invalid = |rule: String| Error::Invalid { what: "mount", value: text.into(), rule };
    let (mut kind, mut source, mut target) = (None, None, None);
    let (mut read_only, mut follow) = (false, false);
    let mut tmpfs = Vec::new();
    for word in text.split(',').filter(|w| !w.is_empty()) {
        let (key, value) = word.split_once('=').map_or((word, None), |(k, v)| (k, Some(v)));
        let needed = || {
            value.filter(|v| !v.is_empty()).ok_or_else(|| invalid(format!("{key:?} needs a value")))
        };
        match key {
            "type" => kind = Some(needed()?),
            "source" | "src" => source = Some(needed()?),
            "target" | "destination" | "dst" => target = Some(needed()?),
            "readonly" | "ro" => {
                read_only = match value {
                    None | Some("true" | "1") => true,
                    Some("false" | "0") => false,
                    Some(_) => return Err(invalid(format!("{key:?} is true or false"))),
                }
            }
            "tmpfs-size" => tmpfs.push(format!("size={}", needed()?)),
            "tmpfs-mode" => tmpfs.push(format!("mode={}", needed()?)),
            "bind-propagation" => match needed()? {
                "rprivate" | "private" => follow = false,
                "rslave" | "slave" => follow = true,
                "rshared" | "shared" => return Err(invalid(SHARED.into())),
                _ => return Err(invalid(format!("{key:?} is rprivate or rslave"))),
            },
            "consistency" => {
                needed()?;
            }
            _ => {
                return Err(invalid(format!(
                    "unknown key {key:?}: there are type, source, target, readonly, tmpfs-size, tmpfs-mode"
                )));
            }
        }
    }
    let target = target.ok_or_else(|| invalid("target=PATH is missing".into()))?;
    check_target(target).map_err(invalid)?;
    let mount = match kind {
        Some("bind") => {
            let source = source.ok_or_else(|| invalid("source=PATH is missing".into()))?;
            if !tmpfs.is_empty() {
                return Err(invalid("tmpfs-size and tmpfs-mode are for type=tmpfs".into()));
            }
            let source = source_path(source).map_err(invalid)?;
            Mount::Bind(Bind { source, target: target.into(), read_only, create: false, follow })
        }
        Some("tmpfs") => {
            if source.is_some() {
                return Err(invalid("memory has no source".into()));
            }
            if follow {
                return Err(invalid("bind-propagation is for type=bind".into()));
            }
            if read_only {
                tmpfs.push("ro".into());
            }
            Mount::Tmpfs(format!("{target}:{}", tmpfs.join(",")).parse()?)
        }
        Some("volume") | None => {
            return Err(invalid(
                "there are no named volumes: write type=bind with a source, or type=tmpfs".into(),
            ));
        }
        Some(other) => {
            return Err(invalid(format!("unknown type {other:?}: there are bind and tmpfs")));
        }
    };
    Ok(Asked { mount, notices: Vec::new() })
}

fn source_path(source: &str) -> Result<PathBuf, String> {
    if source.is_empty() {
        return Err("the source is empty".into());
    }
    let is_path = source.starts_with('/')
        || source == "."
        || source == ".."
        || source.starts_with("./")
        || source.starts_with("../");
    if !is_path {
        return Err(format!(
            "there are no named volumes: write ./{source} or an absolute path for a directory"
        ));
    }
    std::path::absolute(source).map_err(|e| e.to_string())
}

fn check_target(target: &str) -> Result<(), String> {
    if !target.starts_with('/') {
        return Err("the target must be an absolute path in the container".into());
    }
    if Path::new(target).components().count() < 2 {
        return Err("the target cannot be the root directory".into());
    }
    Ok(())
}

/// Finds the sources, and makes those that are to be made.
///
/// # Errors
/// One is missing, or two mounts have one target.
pub fn resolve(binds: &[Bind], tmpfs: &[Tmpfs]) -> Result<Vec<Volume>, Error> {
    let invalid = |bind: &Bind, rule: String| Error::Invalid {
        what: "mount",
        value: format!("{}:{}", bind.source.display(), bind.target),
        rule,
    };
    let mut targets: BTreeSet<PathBuf> = tmpfs.iter().map(|t| normal(&t.path)).collect();
    let mut volumes = Vec::new();
    for (index, bind) in binds.iter().enumerate() {
        if !targets.insert(normal(&bind.target)) {
            return Err(invalid(bind, format!("duplicate mount point: {}", bind.target)));
        }
        let metadata = match std::fs::metadata(&bind.source) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && bind.create => {
                let made = std::fs::create_dir_all(&bind.source);
                made.and_then(|()| std::fs::metadata(&bind.source))
                    .map_err(|e| invalid(bind, format!("cannot make the source directory: {e}")))?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let source = bind.source.display();
                return Err(invalid(bind, format!("bind source path does not exist: {source}")));
            }
            other => other.map_err(|e| invalid(bind, format!("cannot use the source: {e}")))?,
        };
        if bind.follow {
            check_followed(&bind.source).map_err(|rule| invalid(bind, rule))?;
        }
        let name = format!("volume{index}");
        volumes.push(Volume { name, bind: bind.clone(), file: !metadata.is_dir() });
    }
    // Parents before children.
    volumes.sort_by_key(|v| Path::new(&v.bind.target).components().count());
    Ok(volumes)
}

/// Refuses, as docker does, to follow the mounts of a source that nothing would be heard of.
fn check_followed(source: &Path) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("rslave: what the host mounts can be followed by root alone".into());
    }
    match can_be_followed(source) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!(
            "rslave: {} is in a mount that is neither shared nor a slave: nothing is heard of what the host mounts \
             there; make it shared (mount --make-rshared) or leave rslave out",
            source.display()
        )),
        Err(e) => Err(format!("rslave: cannot look at the mounts of the source: {e}")),
    }
}

/// A path without what does not change its meaning.
pub(super) fn normal(path: impl AsRef<Path>) -> PathBuf {
    path.as_ref().components().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(text: &str) -> Bind {
        parse_volume(text).unwrap().mount
    }

    #[test]
    fn volumes_are_read_as_docker_reads_them() {
        let plain = bind("/a:/b");
        assert_eq!((plain.source, plain.target), ("/a".into(), "/b".into()));
        assert!(bind("/a:/b:ro").read_only && !bind("/a:/b:rw").read_only && bind("/a:/b").create);
        assert!(bind("./a:/b").source.is_absolute());
        assert!(
            bind("/a:/b:ro,rslave").follow && bind("/a:/b:slave").follow && !bind("/a:/b").follow
        );
        assert_eq!(parse_volume("/a:/b:z,ro").unwrap().notices.len(), 1);
        for (bad, want) in [
            ("/a", "SOURCE:TARGET"),
            ("data:/b", "no named volumes"),
            ("/a:b", "absolute path in the container"),
            ("/a:/", "root directory"),
            (":/b", "empty"),
            ("/a:/b:ro:x", "SOURCE:TARGET[:OPTIONS]"),
            ("/a:/b:bogus", "\"bogus\""),
            ("/a:/b:rshared", "no rshared"),
        ] {
            let error = parse_volume(bad).unwrap_err().to_string();
            assert!(error.contains(want), "{bad}: {error}");
        }
    }

    #[test]
    fn mounts_are_read_as_docker_reads_them() {
        let mount = |text: &str| parse_mount(text).unwrap().mount;
        let Mount::Bind(bind) = mount("type=bind,src=/a,dst=/b,readonly") else { panic!() };
        assert!(bind.read_only && !bind.create);
        let Mount::Bind(bind) = mount("type=bind,source=/a,target=/b,ro=false") else { panic!() };
        assert!(!bind.read_only && !bind.follow);
        let Mount::Bind(bind) = mount("type=bind,src=/a,dst=/b,bind-propagation=rslave") else {
            panic!()
        };
        assert!(bind.follow);
        assert!(matches!(mount("type=tmpfs,target=/t,tmpfs-size=1m"), Mount::Tmpfs(_)));
        for (bad, want) in [
            ("type=bind,target=/b", "source=PATH"),
            ("type=bind,source=/a", "target=PATH"),
            ("source=x,target=/b", "named volumes"),
            ("type=npipe,source=/a,target=/b", "\"npipe\""),
            ("type=bind,source=/a,target=/b,volume-nocopy", "\"volume-nocopy\""),
            ("type=tmpfs,source=/a,target=/b", "no source"),
            ("type=bind,source=/a,target=/b,bind-propagation=rshared", "no rshared"),
            ("type=bind,source=/a,target=/b,bind-propagation=x", "rprivate or rslave"),
            ("type=tmpfs,target=/b,bind-propagation=rslave", "type=bind"),
            ("type=bind,source=/a,target=/b,ro=maybe", "true or false"),
        ] {
            let error = parse_mount(bad).unwrap_err().to_string();
            assert!(error.contains(want), "{bad}: {error}");
        }
    }

    #[test]
    fn missing_sources_are_made_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let made = resolve(&[bind(&format!("{}:/x/y", path("a/b")))], &[]).unwrap();
        assert!(dir.path().join("a/b").is_dir() && !made[0].file);
        std::fs::write(dir.path().join("f"), b"").unwrap();
        let two = [bind(&format!("{}:/x/y", path("a"))), bind(&format!("{}:/x", path("f")))];
        let both = resolve(&two, &[]).unwrap();
        assert!(both[0].bind.target == "/x" && both[0].file, "parents first");
        let text = format!("type=bind,source={},target=/x", path("none"));
        let Mount::Bind(strict) = parse_mount(&text).unwrap().mount else { panic!() };
        let error = resolve(&[strict], &[]).unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
        let tmpfs = ["/x/".parse().unwrap()];
        let error = resolve(&[bind(&format!("{}:/x", path("a")))], &tmpfs).unwrap_err();
        assert!(error.to_string().contains("duplicate mount point"), "{error}");
    }
}
