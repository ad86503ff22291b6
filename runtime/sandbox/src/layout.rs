//! Where things are kept.
//!
//! * The *run* directory holds one directory per sandbox with its state and sockets. It lives
//!   where a restart of the host empties it.
//! * The *data* directory holds the images and, per sandbox, the logs.
//!
//! Root uses `/run/mvm` and `/var/lib/mvm`, anybody else `$XDG_RUNTIME_DIR/mvm` and
//! `$XDG_DATA_HOME/mvm`; one `--root DIR` replaces both by `DIR/run` and `DIR/data`.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The directories of one installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    run: PathBuf,
    data: PathBuf,
}

/// Why the directories cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither an XDG variable nor a home directory says where to go.
    #[error(
        "there is no directory to keep state in: HOME and XDG_DATA_HOME are not set; \
         set one of them or give --root DIR"
    )]
    NoHome,
    /// A directory could not be made.
    #[error("cannot make the directory {}: {source}; give another with --root DIR", path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The run directory belongs to somebody else, who could then control our guests.
    #[error("{} belongs to user {owner}, not to user {me}; give another with --root DIR", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who we are.
        me: u32,
    },
}

/// What of the surroundings decides where things are kept.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// The effective user id.
    pub uid: u32,
    /// `$XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `$XDG_DATA_HOME`.
    pub data_home: Option<PathBuf>,
    /// `$HOME`.
    pub home: Option<PathBuf>,
}

impl Surroundings {
    /// Those of the calling process.
    pub fn current() -> Self {
        // The XDG specification: a relative path is invalid and is to be ignored.
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        Self {
            uid: nix::unistd::geteuid().as_raw(),
            runtime_dir: absolute("XDG_RUNTIME_DIR"),
            data_home: absolute("XDG_DATA_HOME"),
            home: absolute("HOME"),
        }
    }
}

impl Layout {
    /// The layout below one directory of the user's choice.
    pub fn at(root: &Path) -> Self {
        Self { run: root.join("run"), data: root.join("data") }
    }

    /// The layout that belongs to these surroundings.
    pub fn of(around: &Surroundings) -> Result<Self, Error> {
        if around.uid == 0 {
            return Ok(Self { run: "/run/mvm".into(), data: "/var/lib/mvm".into() });
        }
        let data = match (&around.data_home, &around.home) {
            (Some(data_home), _) => data_home.join("mvm"),
            (None, Some(home)) => home.join(".local/share/mvm"),
            (None, None) => return Err(Error::NoHome),
        };
        let login_dir = PathBuf::from(format!("/run/user/{}", around.uid));
        let run = match &around.runtime_dir {
            Some(dir) => dir.join("mvm"),
            // `su` and cron give no variable although the directory is there.
            None if owned_by(&login_dir, around.uid) => login_dir.join("mvm"),
            None => data.join("run"),
        };
        Ok(Self { run, data })
    }

    /// `--root`, else what belongs to the surroundings.
    pub fn new(root: Option<&Path>) -> Result<Self, Error> {
        match root {
            Some(root) => {
                let absolute = std::path::absolute(root)
                    .map_err(|source| Error::Create { path: root.to_owned(), source })?;
                Ok(Self::at(&absolute))
            }
            None => Self::of(&Surroundings::current()),
        }
    }

    /// Makes the directories; the run directory is for its owner only.
    pub fn prepare(&self) -> Result<(), Error> {
        for dir in [self.sandboxes(), self.names(), self.logs()] {
            make_private(&dir)?;
        }
        let me = nix::unistd::geteuid().as_raw();
        let owner = std::fs::metadata(&self.run)
            .map_err(|source| Error::Create { path: self.run.clone(), source })?
            .uid();
        if owner != me {
            return Err(Error::Owner { path: self.run.clone(), owner, me });
        }
        Ok(())
    }

    /// One directory per sandbox: state and sockets.
    pub fn sandboxes(&self) -> PathBuf {
        self.run.join("sandboxes")
    }

    /// One symbolic link per name, to the sandbox that bears it.
    pub fn names(&self) -> PathBuf {
        self.run.join("names")
    }

    /// One directory per sandbox: console and container output.
    pub fn logs(&self) -> PathBuf {
        self.data.join("logs")
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// One socket per containerd shim.
    pub fn shims(&self) -> PathBuf {
        self.run.join("shims")
    }

    /// What is known of the host's KVM until the next restart.
    pub fn probe_file(&self) -> PathBuf {
        self.run.join("probe.json")
    }

    /// The frequency of the host's time-stamp counter, until the next restart.
    pub fn tsc_file(&self) -> PathBuf {
        self.run.join("tsc.json")
    }

    /// What is counted over all machines until the next restart.
    pub fn metrics_file(&self) -> PathBuf {
        self.run.join("metrics.json")
    }

    /// Taken while sandboxes are made, named or removed.
    pub fn lock_file(&self) -> PathBuf {
        self.run.join("lock")
    }
}

fn owned_by(path: &Path, uid: u32) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == uid)
}

/// Makes `path` and its parents, readable by the owner only.
pub fn make_private(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| Error::Create { path: path.to_owned(), source })
}

/// Opens `path` as a lock file, made on first use.
pub fn open_lock(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(
        runtime_dir: Option<&str>,
        data_home: Option<&str>,
        home: Option<&str>,
    ) -> Surroundings {
        Surroundings {
            uid: 4_000_000,
            runtime_dir: runtime_dir.map(Into::into),
            data_home: data_home.map(Into::into),
            home: home.map(Into::into),
        }
    }

    #[test]
    fn root_uses_the_system_directories_whatever_the_variables_say() {
        let around = Surroundings { uid: 0, ..user(Some("/x"), Some("/y"), Some("/root")) };
        let layout = Layout::of(&around).unwrap();
        assert_eq!(layout.sandboxes(), Path::new("/run/mvm/sandboxes"));
        assert_eq!(layout.images(), Path::new("/var/lib/mvm/images"));
    }

    #[test]
    fn users_follow_the_xdg_variables_then_their_home() {
        let layout = Layout::of(&user(Some("/run/user/7"), Some("/d"), Some("/h"))).unwrap();
        assert_eq!(layout.sandboxes(), Path::new("/run/user/7/mvm/sandboxes"));
        assert_eq!(layout.logs(), Path::new("/d/mvm/logs"));
        let layout = Layout::of(&user(None, None, Some("/h"))).unwrap();
        assert_eq!(layout.sandboxes(), Path::new("/h/.local/share/mvm/run/sandboxes"));
        assert!(matches!(Layout::of(&user(None, None, None)), Err(Error::NoHome)));
    }

    #[test]
    fn directories_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::at(&dir.path().join("r"));
        layout.prepare().unwrap();
        let mode = std::fs::metadata(layout.sandboxes()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
        layout.prepare().unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("r"), "").unwrap();
        let e = Layout::at(&dir.path().join("r")).prepare().unwrap_err();
        assert!(e.to_string().contains("--root"), "{e}");
    }
}
