//! The sandboxes of one layout: made, found, listed and removed.
//!
//! A directory is a sandbox as soon as it holds a state file. Names are symbolic links beside the
//! directories, so that two front doors that want the same name cannot both get it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::layout::{self, Layout};
use crate::state::{self, State};

/// Why a sandbox was not found or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directories cannot be used.
    #[error(transparent)]
    Layout(#[from] layout::Error),
    /// Nothing bears this name or id.
    #[error("no such container: {0}; `mvm ps -a` lists them")]
    NotFound(String),
    /// The beginning of an id fits several.
    #[error("{prefix:?} is the beginning of {count} ids; give more digits")]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// How many fit.
        count: usize,
    },
    /// The name is taken.
    #[error(
        "the container name {name:?} is already in use by container {id}; \
         remove it by `mvm rm {name}` or take another name"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Who bears it.
        id: String,
    },
    /// The name has a form that cannot be used.
    #[error(
        "invalid container name {0:?}: a name is 2 to 128 of the characters [a-zA-Z0-9_.-] \
         and starts with a letter or digit"
    )]
    InvalidName(String),
    /// A state file cannot be used.
    #[error(transparent)]
    State(#[from] state::Error),
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// All sandboxes of a layout.
#[derive(Debug, Clone)]
pub struct Registry {
    layout: Layout,
}

/// A sandbox's places on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Twelve hexadecimal digits.
    pub id: String,
    /// State and sockets, for the owner only.
    pub dir: PathBuf,
    /// Console and container output.
    pub logs: PathBuf,
}

/// A sandbox as found.
#[derive(Debug)]
pub struct Entry {
    /// Where it is.
    pub place: Place,
    /// Its state, or why that cannot be read.
    pub state: Result<State, state::Error>,
}

impl Registry {
    /// The sandboxes of `layout`, whose directories are made as needed.
    pub fn open(layout: Layout) -> Result<Self, Error> {
        layout.prepare()?;
        Ok(Self { layout })
    }

    /// The directories.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Held while names and directories change.
    fn lock(&self) -> Result<Flock<File>, Error> {
        let path = self.layout.lock_file();
        let file = layout::open_lock(&path).map_err(at(&path))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| at(&path)(e.into()))
    }

    fn place(&self, id: &str) -> Place {
        Place {
            id: id.to_owned(),
            dir: self.layout.sandboxes().join(id),
            logs: self.layout.logs().join(id),
        }
    }

    /// Makes a sandbox under `name`, or under a made-up one. `fill` writes the first state; if it
    /// fails nothing is left.
    pub fn create(
        &self,
        name: Option<&str>,
        fill: impl FnOnce(&Place, &str) -> State,
    ) -> Result<(Place, State), Error> {
        if let Some(name) = name {
            check_name(name)?;
        }
        let _lock = self.lock()?;
        let place = self.place(&crate::names::random_id().map_err(at(Path::new("/dev/urandom")))?);
        let name = match name {
            Some(name) => name.to_owned(),
            None => self.free_name(&place.id),
        };
        self.take_name(&name, &place.id)?;
        let made = self.make_dirs(&place).and_then(|()| {
            let state = fill(&place, &name);
            state.save(&place.dir)?;
            Ok(state)
        });
        match made {
            Ok(state) => Ok((place, state)),
            Err(e) => {
                // The error that matters is `e`; what was made a moment ago goes as far as it can.
                let _ = self.forget(&place);
                Err(e)
            }
        }
    }

    fn make_dirs(&self, place: &Place) -> Result<(), Error> {
        for dir in [&place.dir, &place.logs] {
            DirBuilder::new().mode(0o700).create(dir).map_err(at(dir))?;
        }
        Ok(())
    }

    fn free_name(&self, id: &str) -> String {
        let name = crate::names::made_up(id);
        if fs::symlink_metadata(self.layout.names().join(&name)).is_ok() {
            format!("{name}-{id}")
        } else {
            name
        }
    }

    fn take_name(&self, name: &str, id: &str) -> Result<(), Error> {
        let link = self.layout.names().join(name);
        match symlink(id, &link) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let holder = fs::read_link(&link).map_err(at(&link))?;
                let holder = holder.to_string_lossy().into_owned();
                if self.place(&holder).dir.exists() {
                    return Err(Error::NameTaken { name: name.to_owned(), id: holder });
                }
                // Left by a crash between two steps of a removal.
                fs::remove_file(&link).map_err(at(&link))?;
                symlink(id, &link).map_err(at(&link))
            }
            Err(e) => Err(at(&link)(e)),
        }
    }

    /// The sandbox with this name, id, or unambiguous beginning of an id.
    pub fn find(&self, wanted: &str) -> Result<Place, Error> {
        let missing = || Error::NotFound(wanted.to_owned());
        if check_name(wanted).is_ok()
            && let Ok(id) = fs::read_link(self.layout.names().join(wanted))
        {
            let place = self.place(&id.to_string_lossy());
            if place.dir.exists() {
                return Ok(place);
            }
        }
        if wanted.is_empty() || !wanted.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let mut fits: Vec<String> =
            self.ids()?.into_iter().filter(|id| id.starts_with(wanted)).collect();
        match (fits.pop(), fits.len()) {
            (None, _) => Err(missing()),
            (Some(id), 0) => Ok(self.place(&id)),
            (Some(_), more) => Err(Error::Ambiguous { prefix: wanted.to_owned(), count: more + 1 }),
        }
    }

    fn ids(&self) -> Result<Vec<String>, Error> {
        let dir = self.layout.sandboxes();
        let mut ids = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let name = entry.map_err(at(&dir))?.file_name();
            if let Some(id) = name.to_str() {
                ids.push(id.to_owned());
            }
        }
        Ok(ids)
    }

    /// All sandboxes, newest first. One whose state cannot be read is listed with the error.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for id in self.ids()? {
            let place = self.place(&id);
            let state = State::load(&place.dir);
            // Between the listing and here it was removed, or is only being made.
            if matches!(&state, Err(state::Error::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound)
                && !self.is_abandoned(&place)
            {
                continue;
            }
            entries.push(Entry { place, state });
        }
        entries.sort_by_key(|e| std::cmp::Reverse(e.state.as_ref().map_or(0, |s| s.created)));
        Ok(entries)
    }

    /// A directory without a state while nobody holds the lock: its maker was killed.
    fn is_abandoned(&self, place: &Place) -> bool {
        let Ok(_lock) = self.lock() else { return false };
        place.dir.exists() && !place.dir.join(state::STATE_FILE).exists()
    }

    /// Removes every trace of a sandbox. One that is gone already is no error.
    pub fn remove(&self, place: &Place) -> Result<(), Error> {
        // Of a sandbox that was never looked at since its owner was killed.
        if let Err(e) = crate::network::tear_down(&place.dir) {
            tracing::warn!("the network of sandbox {}: {e}", place.id);
        }
        let _lock = self.lock()?;
        self.forget(place)
    }

    fn forget(&self, place: &Place) -> Result<(), Error> {
        let names = self.layout.names();
        for entry in fs::read_dir(&names).map_err(at(&names))? {
            let link = entry.map_err(at(&names))?.path();
            if fs::read_link(&link).is_ok_and(|id| id == Path::new(&place.id)) {
                absent_is_fine(fs::remove_file(&link)).map_err(at(&link))?;
            }
        }
        // The state goes last: until then the sandbox is still listed and can be removed again.
        for dir in [&place.logs, &place.dir] {
            absent_is_fine(fs::remove_dir_all(dir)).map_err(at(dir))?;
        }
        Ok(())
    }

    /// Removes logs whose sandbox is gone (the run directory was emptied by a restart).
    pub fn sweep_logs(&self) -> Result<(), Error> {
        let _lock = self.lock()?;
        let logs = self.layout.logs();
        for entry in fs::read_dir(&logs).map_err(at(&logs))? {
            let entry = entry.map_err(at(&logs))?;
            if !self.layout.sandboxes().join(entry.file_name()).exists() {
                absent_is_fine(fs::remove_dir_all(entry.path())).map_err(at(&entry.path()))?;
            }
        }
        Ok(())
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Docker's rule for names.
pub fn check_name(name: &str) -> Result<(), Error> {
    let bytes = name.as_bytes();
    let ok = (2..=128).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(b));
    if ok { Ok(()) } else { Err(Error::InvalidName(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::sample;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(Layout::at(dir.path())).unwrap();
        (dir, registry)
    }

    fn make(registry: &Registry, name: Option<&str>) -> Result<(Place, State), Error> {
        registry.create(name, |place, name| sample(&place.id, name))
    }

    #[test]
    fn created_sandbox_is_found_by_name_id_and_prefix() {
        let (_dir, registry) = registry();
        let (place, state) = make(&registry, Some("web")).unwrap();
        assert_eq!(state.name, "web");
        for key in ["web", &place.id, &place.id[..6]] {
            assert_eq!(registry.find(key).unwrap(), place, "{key}");
        }
        assert!(matches!(registry.find("nope"), Err(Error::NotFound(_))));
        assert!(matches!(registry.find(""), Err(Error::NotFound(_))));
        assert!(matches!(registry.find("../web"), Err(Error::NotFound(_))));
    }

    #[test]
    fn a_name_is_given_once_and_free_after_removal() {
        let (_dir, registry) = registry();
        let (place, _) = make(&registry, Some("web")).unwrap();
        let e = make(&registry, Some("web")).unwrap_err();
        assert!(matches!(&e, Error::NameTaken { id, .. } if *id == place.id), "{e}");
        assert_eq!(registry.list().unwrap().len(), 1);
        registry.remove(&place).unwrap();
        registry.remove(&place).unwrap();
        make(&registry, Some("web")).unwrap();
    }

    #[test]
    fn a_name_left_by_a_crash_is_taken_over() {
        let (_dir, registry) = registry();
        symlink("feedfeedfeed", registry.layout().names().join("web")).unwrap();
        make(&registry, Some("web")).unwrap();
    }

    #[test]
    fn two_at_once_with_one_name_give_one_winner() {
        let (_dir, registry) = registry();
        let won: usize = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| usize::from(make(&registry, Some("web")).is_ok())))
                .collect();
            tries.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(won, 1);
        assert_eq!(registry.list().unwrap().len(), 1);
    }

    #[test]
    fn removal_leaves_nothing() {
        let (dir, registry) = registry();
        let (place, _) = make(&registry, None).unwrap();
        fs::write(place.logs.join("console.log"), "x").unwrap();
        registry.remove(&place).unwrap();
        for sub in ["run/sandboxes", "run/names", "data/logs"] {
            assert_eq!(fs::read_dir(dir.path().join(sub)).unwrap().count(), 0, "{sub}");
        }
    }

    #[test]
    fn damaged_and_abandoned_sandboxes_are_listed() {
        let (_dir, registry) = registry();
        let (place, _) = make(&registry, None).unwrap();
        fs::write(place.dir.join(state::STATE_FILE), "junk").unwrap();
        fs::create_dir(registry.layout().sandboxes().join("aaaaaaaaaaaa")).unwrap();
        let list = registry.list().unwrap();
        assert_eq!(list.len(), 2);
        assert!(list.iter().all(|e| e.state.is_err()));
        for entry in list {
            registry.remove(&entry.place).unwrap();
        }
        assert!(registry.list().unwrap().is_empty());
    }

    #[test]
    fn logs_of_a_former_boot_are_swept() {
        let (_dir, registry) = registry();
        let (place, _) = make(&registry, None).unwrap();
        let orphan = registry.layout().logs().join("bbbbbbbbbbbb");
        fs::create_dir(&orphan).unwrap();
        registry.sweep_logs().unwrap();
        assert!(!orphan.exists());
        assert!(place.logs.exists());
    }

    #[test]
    fn names_follow_dockers_rule() {
        for good in ["ab", "a_b.c-d", "0x"] {
            check_name(good).unwrap();
        }
        for bad in ["", "a", "-ab", ".ab", "a/b", "a b", "ä1", &"a".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
