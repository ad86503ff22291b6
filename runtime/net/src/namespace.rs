//! Network namespaces, by file and descriptor.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use mvm_netlink::Socket;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Which namespace it is, whatever file it is reached by. Good until the host's next boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    device: u64,
    inode: u64,
}

/// A network namespace, held open.
#[derive(Debug)]
pub struct Namespace {
    path: PathBuf,
    file: File,
    identity: Identity,
}

impl Namespace {
    /// Where named namespaces are (`ip-netns(8)`).
    pub const DIRECTORY: &'static str = "/run/netns";

    /// Opens the namespace at `path`, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Namespace { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        if !sys::is_network_namespace(file.as_fd()) {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no network namespace",
            )));
        }
        let about = file.metadata().map_err(failed)?;
        let identity = Identity { device: about.dev(), inode: about.ino() };
        Ok(Self { path: path.to_owned(), file, identity })
    }

    /// Makes a namespace and gives it the file `name` in [`Namespace::DIRECTORY`].
    ///
    /// # Errors
    /// The name is taken or the host refuses.
    pub fn create(name: &str) -> Result<Self, Error> {
        let path = Path::new(Self::DIRECTORY).join(name);
        let failed = |what: &str| {
            let what = format!("cannot make the network namespace {}: {what}", path.display());
            move |source| Error::Io { what, source }
        };
        fs::create_dir_all(Self::DIRECTORY).map_err(failed("its directory"))?;
        File::options().write(true).create_new(true).open(&path).map_err(failed("its file"))?;
        let made = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let own = "/proc/thread-self/ns/net";
            mount(Some(own), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        });
        if let Err(source) = made {
            // What was made a moment ago.
            let _ = fs::remove_file(&path);
            return Err(failed("this needs root (CAP_SYS_ADMIN)")(source));
        }
        Self::open(&path)
    }

    /// Removes the file of the namespace `name`; the namespace goes when nobody uses it any more.
    /// One that is not there is no error.
    ///
    /// # Errors
    /// The host refuses.
    pub fn remove(name: &str) -> Result<(), Error> {
        let path = Path::new(Self::DIRECTORY).join(name);
        let failed = |source| Error::Io {
            what: format!("cannot remove the network namespace {}", path.display()),
            source,
        };
        match umount2(&path, MntFlags::MNT_DETACH) {
            // No namespace is mounted on it, or there is no file.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(failed(e.into())),
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
            _ => Ok(()),
        }
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which one it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Runs `work` on a thread in the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or what `work` says.
    pub fn enter<R: Send>(
        &self,
        work: impl FnOnce() -> io::Result<R> + Send,
    ) -> Result<io::Result<R>, Error> {
        let entered = on_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        });
        entered.map_err(|source| Error::Enter { path: self.path.clone(), source })
    }

    /// A routing socket in the namespace.
    ///
    /// # Errors
    /// [`Error::Enter`], [`Error::Netlink`].
    pub fn socket(&self) -> Result<Socket, Error> {
        let opened = self.enter(|| Ok(Socket::open()))?;
        let opened = opened.unwrap_or_else(|e| Err(mvm_netlink::Error::Socket(e)));
        opened.map_err(|source| self.netlink(source))
    }

    pub(crate) fn netlink(&self, source: mvm_netlink::Error) -> Error {
        Error::Netlink { path: self.path.clone(), source }
    }
}

/// Namespaces are a thread's: what is done in another one is done on a thread that ends.
fn on_thread<R: Send>(work: impl FnOnce() -> io::Result<R> + Send) -> io::Result<R> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

mod sys {
    use std::os::fd::{AsRawFd, BorrowedFd};

    /// `NS_GET_NSTYPE` (`ioctl_ns(2)`).
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

    pub fn is_network_namespace(fd: BorrowedFd<'_>) -> bool {
        // SAFETY: the request has no argument; on files of other kinds it fails.
        unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) == libc::CLONE_NEWNET }
    }
}
