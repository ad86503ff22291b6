//! Bind mounts of the specification: directories and files of the host that a container sees.
//!
//! Each becomes a share of the machine's file server, and the agent binds it where the specification
//! says. What names the host's devices or kernel interfaces means the guest's own.

use std::path::{Component, Path, PathBuf};

use mvm_fs::follow::follow;
use mvm_fs::tree::{Extent, ReadOnly};
use mvm_fs::{Cache, NewShare, ShareOptions, Source, tree};
use mvm_sandbox::spec::volumes::{self, Volume};
use mvm_sandbox::spec::{Memory, PROVIDED_DIR};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::Mount;

use super::pod::Role;

/// Where a pod's containers have shared memory in common.
const SHM: &str = "/dev/shm";

/// The name of that memory.
const SHM_NAME: &str = "pod-shm";

/// Directories of kernel interfaces and devices. The guest has its own.
const OWN: [&str; 3] = ["/dev", "/proc", "/sys"];

/// A mount that cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The source cannot be shared.
    #[error("the mount {destination} of {origin}: {reason}")]
    Source {
        /// Where it would be.
        destination: String,
        /// What it is of.
        origin: String,
        /// Why.
        reason: String,
    },
    /// Mounts would have to come from the guest.
    #[error(
        "the mount {destination}: option {word:?}: what is mounted in a guest is mounted in no other kernel; \
         use rslave (HostToContainer) for what the host mounts, or private"
    )]
    Propagation {
        /// Where it would be.
        destination: String,
        /// The option.
        word: String,
    },
}

/// A directory or file of the host that a container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Name of the share and of the volume in the guest.
    pub name: String,
    /// Absolute path on the host.
    pub source: PathBuf,
    /// How much of it.
    pub extent: Extent,
    /// What the host mounts below the source later is seen.
    follow: bool,
    file: bool,
    destination: String,
}

/// What mounts need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Provided {
    /// Of the host's files.
    pub binds: Vec<Bind>,
    /// Of the guest's memory.
    pub memory: Vec<Memory>,
}

impl Bind {
    /// What the agent is told of it.
    pub fn volume(&self) -> Volume {
        let bind = volumes::Bind {
            source: self.source.clone(),
            target: self.destination.clone(),
            read_only: self.extent.read_only == ReadOnly::All,
            create: false,
            follow: self.follow,
        };
        Volume { name: self.name.clone(), bind, file: self.file }
    }

    /// The share, with the tree as it is now.
    ///
    /// # Errors
    /// The source is gone, or the host refuses.
    pub fn share(&self) -> Result<NewShare, tree::TreeError> {
        let tree = if self.follow {
            follow(&self.source, self.extent, Path::new("/proc/self/exe"))?
        } else {
            tree::detach(&self.source, self.extent)?
        };
        let source = Source::Tree(tree);
        let read_only = self.extent.read_only == ReadOnly::All;
        let options = ShareOptions { read_only, cache: Cache::Live };
        Ok(NewShare { name: self.name.clone(), source, options })
    }
}

/// Rewrites bind mounts to what the guest will find, and says what that is. Shares' names begin with
/// `name`.
///
/// # Errors
/// See [`Error`].
pub fn provide(
    mounts: &mut [Mount],
    bundle: &Path,
    role: Role,
    name: &str,
) -> Result<Provided, Error> {
    let mut provided = Provided::default();
    for (index, mount) in mounts.iter_mut().enumerate() {
        let Some(asked) = Asked::of(mount, bundle) else { continue };
        if asked.is_guests() {
            continue;
        }
        if role == Role::Member
            && let Some(size) = asked.shared_memory()
        {
            mount.set_source(Some(Path::new(PROVIDED_DIR).join(SHM_NAME)));
            provided.memory.push(Memory { name: SHM_NAME.into(), size });
            continue;
        }
        let bind = asked.bind(format!("{name}-v{index}"))?;
        mount.set_source(Some(Path::new(PROVIDED_DIR).join(&bind.name)));
        if bind.extent.read_only == ReadOnly::Top {
            // The guest sees one file system where the host has several: it must not forbid to write
            // what can be written. The host forbids the rest.
            let words = mount.options().iter().flatten().filter(|w| *w != "ro").cloned();
            let words = words.collect();
            mount.set_options(Some(words));
        }
        provided.binds.push(bind);
    }
    Ok(provided)
}

/// A bind mount as the specification has it.
struct Asked {
    source: PathBuf,
    destination: String,
    words: Vec<String>,
    recursive: bool,
}

impl Asked {
    fn of(mount: &Mount, bundle: &Path) -> Option<Self> {
        let words = mount.options().clone().unwrap_or_default();
        let has = |word: &str| words.iter().any(|w| w == word);
        let kind = mount.typ().as_deref();
        if has("remount")
            || !(matches!(kind, Some("bind" | "rbind")) || has("bind") || has("rbind"))
        {
            return None;
        }
        let source = mount.source().as_ref()?;
        let recursive = has("rbind") || !has("bind");
        let destination = mount.destination().display().to_string();
        Some(Self { source: bundle.join(source), destination, words, recursive })
    }

    fn is_guests(&self) -> bool {
        let plain = self.source.components().all(|c| c != Component::ParentDir);
        // What somebody has put into the host's shared memory is a directory like any other.
        let below_shm = self.source != Path::new(SHM) && self.source.starts_with(SHM);
        plain && !below_shm && OWN.iter().any(|own| self.source.starts_with(own))
    }

    /// The size of the memory that the host has prepared for a pod.
    fn shared_memory(&self) -> Option<u64> {
        if Path::new(&self.destination) != Path::new(SHM) {
            return None;
        }
        let about = statfs(&self.source).ok()?;
        let size = about.blocks().checked_mul(u64::try_from(about.block_size()).ok()?)?;
        (about.filesystem_type() == TMPFS_MAGIC).then_some(size)
    }

    fn bind(self, name: String) -> Result<Bind, Error> {
        let is_shared = |word: &&String| matches!(word.as_str(), "shared" | "rshared");
        if let Some(word) = self.words.iter().find(is_shared) {
            return Err(Error::Propagation { destination: self.destination, word: word.clone() });
        }
        let failed = |reason: String| Error::Source {
            destination: self.destination.clone(),
            origin: self.source.display().to_string(),
            reason,
        };
        let metadata = std::fs::metadata(&self.source).map_err(|e| failed(e.to_string()))?;
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(failed(
                "only directories and regular files can be shared with a guest: a socket, pipe or device \
                 of the host has nobody at its other end there"
                    .into(),
            ));
        }
        // Nothing is mounted below a file.
        let follow = self.follows() && metadata.is_dir();
        let read_only = self.read_only(follow).map_err(|e| failed(e.to_string()))?;
        Ok(Bind {
            name,
            follow,
            extent: Extent { recursive: self.recursive, read_only },
            file: metadata.is_file(),
            source: self.source,
            destination: self.destination,
        })
    }

    /// Whether the last word on propagation says so. Where the source's mount is no shared one there is nothing to be
    /// heard, which runc takes as it comes, too; CRI has refused it before.
    fn follows(&self) -> bool {
        let propagation = ["private", "rprivate", "slave", "rslave", "unbindable", "runbindable"];
        let last = self.words.iter().rfind(|w| propagation.contains(&w.as_str()));
        last.is_some_and(|word| matches!(word.as_str(), "slave" | "rslave"))
    }

    fn read_only(&self, follow: bool) -> std::io::Result<ReadOnly> {
        // The last word counts.
        let top = self.words.iter().rfind(|w| matches!(w.as_str(), "ro" | "rw"));
        let all = self.words.iter().any(|w| w == "rro");
        Ok(match top.map(String::as_str) {
            _ if all => ReadOnly::All,
            // What comes later can be written if the host's can.
            Some("ro") if follow => ReadOnly::Top,
            Some("ro") if self.recursive && has_mounts_below(&self.source)? => ReadOnly::Top,
            Some("ro") => ReadOnly::All,
            _ => ReadOnly::No,
        })
    }
}

/// Whether something is mounted below a directory.
fn has_mounts_below(path: &Path) -> std::io::Result<bool> {
    let path = path.canonicalize()?;
    let mounts = mvm_fs::mounts::parse(&std::fs::read("/proc/self/mountinfo")?);
    Ok(mounts.iter().any(|mount| mount.point != path && mount.point.starts_with(&path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn mounts(destination: &str, source: &Path, options: Value) -> Vec<Mount> {
        let mount = json!([{ "destination": destination, "type": "bind", "source": source, "options": options }]);
        serde_json::from_value(mount).unwrap()
    }

    fn provide_one(destination: &str, source: &Path, options: Value) -> Result<Bind, Error> {
        let mut list = mounts(destination, source, options);
        let mut provided = provide(&mut list, Path::new("/b"), Role::Alone, "c0")?;
        assert_eq!(
            list[0].source().as_deref(),
            Some(Path::new(PROVIDED_DIR).join("c0-v0").as_path())
        );
        Ok(provided.binds.remove(0))
    }

    #[test]
    fn directories_and_files_become_shares() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        let whole = provide_one("/x", dir.path(), json!(["rbind", "ro"])).unwrap();
        assert_eq!(whole.extent, Extent { recursive: true, read_only: ReadOnly::All });
        assert!(!whole.volume().file && whole.volume().bind.read_only);
        let one = provide_one("/x", &file, json!(["bind", "rw", "rprivate"])).unwrap();
        assert_eq!(one.extent, Extent { recursive: false, read_only: ReadOnly::No });
        assert!(one.volume().file && !one.volume().bind.read_only);
        // The last word counts.
        let last = provide_one("/x", &file, json!(["rbind", "ro", "rw"])).unwrap();
        assert_eq!(last.extent.read_only, ReadOnly::No);
    }

    #[test]
    fn what_cannot_be_shared_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for source in [socket.as_path(), Path::new("/no/such")] {
            let error = provide_one("/x", source, json!(["bind"])).unwrap_err();
            assert!(
                matches!(&error, Error::Source { origin, .. } if *origin == source.display().to_string())
            );
        }
        let error = provide_one("/x", dir.path(), json!(["rbind", "rshared"])).unwrap_err();
        assert!(matches!(error, Error::Propagation { word, .. } if word == "rshared"));
    }

    #[test]
    fn kernel_interfaces_and_devices_are_the_guests() {
        for source in ["/sys/fs/cgroup", "/dev", "/proc", "/dev/null"] {
            let mut list = mounts("/x", Path::new(source), json!(["rbind"]));
            let provided = provide(&mut list, Path::new("/b"), Role::Alone, "c0").unwrap();
            assert_eq!(provided, Provided::default());
            assert_eq!(list[0].source().as_deref(), Some(Path::new(source)));
        }
    }

    #[test]
    fn other_mounts_are_left_alone() {
        let list = json!([
            { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"] },
            { "destination": "/proc", "type": "proc", "source": "proc" },
        ]);
        let mut list: Vec<Mount> = serde_json::from_value(list).unwrap();
        let before = list.clone();
        assert_eq!(provide(&mut list, Path::new("/b"), Role::Alone, "c0"), Ok(Provided::default()));
        assert_eq!(list, before);
    }

    #[test]
    fn shared_memory_of_a_pod_is_the_guests() {
        let Some(size) = statfs("/dev/shm").ok().filter(|s| s.filesystem_type() == TMPFS_MAGIC)
        else {
            return;
        };
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let asked = |role| {
            let mut list = mounts("/dev/shm", dir.path(), json!(["rbind", "rw"]));
            provide(&mut list, Path::new("/b"), role, "c0").unwrap()
        };
        let member = asked(Role::Member);
        assert_eq!(member.memory[0].size, size.blocks() * size.block_size() as u64);
        assert!(member.binds.is_empty());
        assert_eq!(asked(Role::Alone).binds.len(), 1);
    }

    #[test]
    fn what_the_host_mounts_is_followed_where_the_last_word_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "x").unwrap();
        let one = |source: &Path, words: Value| provide_one("/x", source, words).unwrap();
        let bind = one(dir.path(), json!(["rbind", "ro", "rslave"]));
        // Only what is there now cannot be written.
        assert!(bind.follow && bind.extent.read_only == ReadOnly::Top);
        assert!(one(dir.path(), json!(["bind", "rprivate", "slave"])).follow);
        assert!(!one(dir.path(), json!(["rbind", "rslave", "rprivate"])).follow);
        assert!(!one(&file, json!(["rbind", "rslave"])).follow, "nothing is mounted below a file");
    }
}
