//! The file server's process, from its first instruction to its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mvm_devices::packets::{PacketError, Packets};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::confine::{self, Layer, Standing};
use crate::protocol::{First, Report, Setup};
use crate::server::FileService;
use crate::shares::{self, Shares};
use crate::tree::{self, Tree, TreeError};
use crate::{seccomp, sys};

/// How long the owner may take to say what is shared, or to read the answer.
const OWNER: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the file server was not told what to serve: {0}")]
    Channel(#[from] PacketError),
    #[error("the file server was handed {0} descriptors, which is too few")]
    Descriptors(usize),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Share(#[from] shares::Error),
    #[error(transparent)]
    Filter(#[from] seccomp::Error),
    #[error("cannot set up the file server: {what}: {source}")]
    SetUp { what: &'static str, source: io::Error },
}

/// Runs this process as a file server: what [`SUBCOMMAND`](crate::SUBCOMMAND) does.
///
/// To be called before the program opens or starts anything. Standard input is the owner channel,
/// standard error the log.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    // A thread that is lost leaves the guest waiting: the process goes, and the machine with it.
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        told(info);
        std::process::abort();
    }));
    let owner = match set_up() {
        Ok(owner) => owner,
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let service = match prepare(&owner) {
        Ok((service, layers)) => {
            // An owner that has gone away meanwhile leaves a machine that never starts.
            let _ = owner.send(&Report::Ready { layers }, &[], OWNER);
            service
        }
        Err(error) => {
            tracing::error!("{error}");
            let _ = owner.send(&Report::Failed { message: error.to_string() }, &[], OWNER);
            return ExitCode::FAILURE;
        }
    };
    drop(owner);
    match service.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the file server ends: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How many descriptors a server may have that this process starts: it takes as many as the hard limit allows.
pub fn max_files() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard)
}

fn set_up() -> Result<Packets, Error> {
    let failed = |what| move |source| Error::SetUp { what, source };
    sys::close_inherited().map_err(failed("close_range"))?;
    let channel: OwnedFd = io::stdin().as_fd().try_clone_to_owned().map_err(failed("dup"))?;
    let null = File::open("/dev/null").map_err(failed("open /dev/null"))?;
    nix::unistd::dup2_stdin(&null).map_err(|e| failed("dup2")(e.into()))?;
    nix::sys::prctl::set_name(c"mvm-files").map_err(|e| failed("prctl")(e.into()))?;
    sys::ignore_hangup().map_err(failed("sigaction"))?;
    // The guest's kernel has applied the umask of whoever asks.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    // Each file that the guest knows is a descriptor here.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    Ok(Packets::from(channel))
}

/// Takes over what is shared, then gives up everything that is not needed to share it.
fn prepare(owner: &Packets) -> Result<(FileService, Vec<Layer>), Error> {
    let (setup, fds): (Setup, _) = owner.receive(Some(Instant::now() + OWNER))?;
    let count = fds.len();
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or(Error::Descriptors(count));
    let device = Packets::from(next()?);
    let listener = next()?;
    fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .map_err(|e| Error::SetUp { what: "fcntl", source: e.into() })?;
    let mut layers = Vec::new();
    let standing = confine::namespaces(&mut layers);
    let mut trees = Vec::new();
    for First { name, options, path, keep } in setup.shares {
        let tree = match path {
            Some(path) => open(path, options.read_only, standing)?,
            None => {
                let root = next()?;
                let keep = (0..keep).map(|_| next()).collect::<Result<_, _>>()?;
                Tree::kept(root, keep)
            }
        };
        trees.push((name, tree, options));
    }
    if standing.own_mounts {
        confine::root(&mut layers);
    }
    confine::privileges(&mut layers);
    let shares = Arc::new(Shares::new(standing.squash));
    for (name, tree, options) in trees {
        shares.add(&name, tree, options)?;
    }
    let service = FileService::new(shares.clone(), device, Some(listener))
        .map_err(|source| Error::SetUp { what: "eventfd", source })?;
    seccomp::install()?;
    layers.push(Layer { name: "system call filter".into(), missing: None });
    tracing::info!("{} serves {} shares", setup.id, shares.names().len());
    Ok((service, layers))
}

fn open(path: Vec<u8>, read_only: bool, standing: Standing) -> Result<Tree, TreeError> {
    let path = PathBuf::from(std::ffi::OsString::from_vec(path));
    if standing.own_mounts {
        tree::detach_here(&path, tree::Extent::whole(read_only))
    } else {
        tree::plain(&path)
    }
}
