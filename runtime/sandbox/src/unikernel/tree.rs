//! Files of an image's root file system, read before anything of the image runs.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use mvm_image::erofs::reader::{FileType, Inode, ReadError, Reader};
use mvm_image::{Owners, pack_directory, write_ext2};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::{DiskSource, Error, Extract, Tree, UnikernelPlan};

/// An image's root file system.
#[derive(Debug)]
pub struct ErofsTree(Reader);

impl ErofsTree {
    /// The one in `rootfs`, an EROFS image.
    ///
    /// # Errors
    /// It is none.
    pub fn open(rootfs: &File) -> Result<Self, Error> {
        let opened = rootfs.try_clone().map_err(ReadError::from).and_then(Reader::open);
        opened.map(Self).map_err(|e| unusable("/", &e))
    }

    /// What is at a path, links followed within the image. A link that leads nowhere is nothing.
    fn find(&self, path: &str) -> Result<Option<Inode>, Error> {
        match self.0.lookup(path) {
            Err(ReadError::Loop { .. }) => Ok(None),
            other => other.map_err(|e| unusable(path, &e)),
        }
    }
}

impl Tree for ErofsTree {
    fn head(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, Error> {
        let Some(inode) = self.find(path)?.filter(|i| i.file_type == FileType::File) else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        let data = self.0.data(&inode).map_err(|e| unusable(path, &e))?;
        data.take(limit as u64).read_to_end(&mut bytes).map_err(|e| unusable(path, &e))?;
        Ok(Some(bytes))
    }
}

impl Extract for ErofsTree {
    fn extract(&self, path: &str, limit: u64, room: Room<'_>) -> Result<File, Error> {
        let fail = |reason: String| Error::File { path: path.into(), reason };
        let inode = self.find(path)?.ok_or_else(|| fail("does not exist".into()))?;
        if inode.file_type != FileType::File {
            return Err(fail("is not a regular file".into()));
        }
        if inode.size > limit {
            return Err(fail(format!("has {} bytes, the limit is {limit}", inode.size)));
        }
        let mut data = self.0.data(&inode).map_err(|e| unusable(path, &e))?;
        copied(&mut data, room).map_err(|e| unusable(path, &e))
    }

    fn whole(&self, limit: u64, room: Room<'_>) -> Result<File, Error> {
        let disk = room.file().map_err(|e| no_disk(&e))?;
        write_ext2(&self.0, &disk, limit).map_err(|e| no_disk(&e))?;
        Ok(disk)
    }
}

/// An image's root file system that is mounted on the host.
#[derive(Debug)]
pub struct DirTree(OwnedFd);

impl DirTree {
    /// The one at `root`.
    ///
    /// # Errors
    /// It is no directory, or cannot be opened.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(root, flags, Mode::empty());
        opened.map(Self).map_err(|e| unusable("/", &e))
    }

    /// Opens a regular file. Links in the tree are followed as in a root of their own (`openat2(2)`,
    /// `RESOLVE_IN_ROOT`); what is no regular file is never opened, since that alone can do something.
    fn find(&self, path: &str) -> Result<Found, Error> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found = match openat2(&self.0, path, flags, Mode::empty(), resolve) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Found::Nothing),
            other => other.map_err(|e| unusable(path, &e))?,
        };
        let about = rustix::fs::fstat(&found).map_err(|e| unusable(path, &e))?;
        if rustix::fs::FileType::from_raw_mode(about.st_mode) != rustix::fs::FileType::RegularFile {
            return Ok(Found::Other);
        }
        // By its descriptor: what has been looked at, whatever is at the path by now.
        let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()));
        file.map(Found::File).map_err(|e| unusable(path, &e))
    }
}

/// What is at a path.
enum Found {
    File(File),
    Other,
    Nothing,
}

impl Tree for DirTree {
    fn head(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, Error> {
        let Found::File(file) = self.find(path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(limit as u64).read_to_end(&mut bytes).map_err(|e| unusable(path, &e))?;
        Ok(Some(bytes))
    }
}

impl Extract for DirTree {
    fn extract(&self, path: &str, limit: u64, room: Room<'_>) -> Result<File, Error> {
        let fail = |reason: String| Error::File { path: path.into(), reason };
        let mut file = match self.find(path)? {
            Found::File(file) => file,
            Found::Other => return Err(fail("is not a regular file".into())),
            Found::Nothing => return Err(fail("does not exist".into())),
        };
        let size = file.metadata().map_err(|e| unusable(path, &e))?.len();
        if size > limit {
            return Err(fail(format!("has {size} bytes, the limit is {limit}")));
        }
        // Somebody may make it longer meanwhile.
        copied(&mut Read::take(&mut file, size), room).map_err(|e| unusable(path, &e))
    }

    fn whole(&self, limit: u64, room: Room<'_>) -> Result<File, Error> {
        // What the descriptor stands for, and not the link by which it is named.
        let root = PathBuf::from(format!("/proc/self/fd/{}/.", self.0.as_raw_fd()));
        let packed = room.file().map_err(|e| no_disk(&e))?;
        let [image, spool] = [packed.try_clone(), room.file()];
        let (image, spool) = (image.map_err(|e| no_disk(&e))?, spool.map_err(|e| no_disk(&e))?);
        pack_directory(&root, image, spool, Owners::Keep, limit).map_err(|e| no_disk(&e))?;
        ErofsTree::open(&packed)?.whole(limit, room)
    }
}

/// Where a copy is kept.
#[derive(Debug, Clone, Copy)]
pub enum Room<'a> {
    /// In memory.
    Memory,
    /// On the disk with this directory.
    Disk(&'a Path),
}

impl Room<'_> {
    /// An empty file without a name.
    fn file(self) -> io::Result<File> {
        match self {
            Self::Memory => Ok(memfd_create(c"mvm-unikernel", MFdFlags::MFD_CLOEXEC)?.into()),
            Self::Disk(directory) => tempfile::tempfile_in(directory),
        }
    }
}

/// The files of an image that a machine is made of, each a copy that nobody else can change: kernel and initrd in memory,
/// where they are read from once, and a disk on the host's.
#[derive(Debug)]
pub struct Files {
    /// The kernel.
    pub kernel: File,
    /// Its initrd.
    pub initrd: Option<File>,
    /// A disk. What the guest writes to it is gone with the machine.
    pub disk: Option<File>,
}

/// Largest files that are taken into memory, in bytes.
const KERNEL_MAX: u64 = 256 << 20;
const INITRD_MAX: u64 = 2 << 30;
const DISK_MAX: u64 = 4 << 30;

impl Files {
    /// Those that `plan` names. `scratch` is a directory where there is room for a disk.
    ///
    /// # Errors
    /// One does not exist, is too large, or cannot be read.
    pub fn extract(
        plan: &UnikernelPlan,
        tree: &dyn Extract,
        scratch: &Path,
    ) -> Result<Self, Error> {
        let in_memory = |path: &str, limit| tree.extract(path, limit, Room::Memory);
        let room = Room::Disk(scratch);
        Ok(Self {
            kernel: in_memory(&plan.kernel, KERNEL_MAX)?,
            initrd: plan.initrd.as_deref().map(|p| in_memory(p, INITRD_MAX)).transpose()?,
            disk: match &plan.disk {
                None => None,
                Some(DiskSource::File(path)) => Some(tree.extract(path, DISK_MAX, room)?),
                Some(DiskSource::Root) => Some(tree.whole(DISK_MAX, room)?),
            },
        })
    }
}

fn no_disk(error: &dyn std::error::Error) -> Error {
    Error::Disk { reason: error.to_string() }
}

/// Bytes that are copied at once; as many zeros in a row are left out.
const PIECE: usize = 64 << 10;

/// A copy of which nobody else has a name or descriptor.
fn copied(from: &mut impl Read, room: Room<'_>) -> io::Result<File> {
    let mut file = room.file()?;
    let mut piece = Vec::with_capacity(PIECE);
    let mut size = 0;
    while from.by_ref().take(PIECE as u64).read_to_end(&mut piece)? > 0 {
        size += piece.len() as u64;
        if piece.iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Start(size))?;
        } else {
            file.write_all(&piece)?;
        }
        piece.clear();
    }
    // The end may have been left out.
    file.set_len(size)?;
    file.rewind()?;
    Ok(file)
}

fn unusable(path: &str, error: &dyn std::error::Error) -> Error {
    Error::File { path: path.into(), reason: format!("cannot be read: {error}") }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use mvm_vmm::config::BootProtocol;

    use super::super::{Dialect, Kind};
    use super::*;

    fn plan() -> UnikernelPlan {
        UnikernelPlan {
            kernel: String::new(),
            initrd: None,
            disk: None,
            boot: BootProtocol::Linux,
            cmdline: String::new(),
            dialect: Dialect::from(Kind::Linux),
            left_out: Vec::new(),
            environment: false,
            words: Vec::new(),
        }
    }

    #[test]
    fn links_of_a_directory_stay_in_it_and_devices_are_left_alone() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "no").unwrap();
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("k"), "kernel").unwrap();
        symlink("/k", root.path().join("absolute")).unwrap();
        symlink("../../k", root.path().join("up")).unwrap();
        symlink(outside.path().join("secret"), root.path().join("out")).unwrap();
        symlink("loop", root.path().join("loop")).unwrap();
        let fifo = root.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let tree = DirTree::open(root.path()).unwrap();
        for path in ["/k", "k", "/absolute", "/up", "/../k"] {
            assert_eq!(tree.head(path, 6).unwrap().as_deref(), Some(&b"kernel"[..]), "{path}");
        }
        for path in ["/out", "/loop", "/fifo", "/none", "/k/x", "/"] {
            assert_eq!(tree.head(path, 6).unwrap(), None, "{path}");
            assert!(tree.extract(path, 6, Room::Memory).is_err(), "{path}");
        }
        let mut text = String::new();
        tree.extract("/k", 6, Room::Memory).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "kernel");
        // All of it, and no more: the disk is ext2, and has the links as they are.
        let disk = tree.whole(1 << 30, Room::Disk(outside.path())).unwrap();
        let (mut magic, mut bytes) = ([0; 2], Vec::new());
        std::os::unix::fs::FileExt::read_exact_at(&disk, &mut magic, 1080).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        (&disk).take(2 << 20).read_to_end(&mut bytes).unwrap();
        let has = |text: &[u8]| bytes.windows(text.len()).any(|part| part == text);
        assert!(has(b"kernel") && has(b"absolute"));
        let error = tree.whole(5, Room::Memory).unwrap_err().to_string();
        assert!(error.contains("limit"), "{error}");
        let error = tree.extract("/k", 5, Room::Memory).unwrap_err().to_string();
        assert!(error.contains("6 bytes"), "{error}");
    }

    #[test]
    fn disks_are_files_without_a_name_where_there_is_room_and_have_holes() {
        let (root, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let content = [vec![7; PIECE + 5], vec![0; 64 * PIECE]].concat();
        std::fs::write(root.path().join("disk.img"), &content).unwrap();
        let tree = DirTree::open(root.path()).unwrap();
        let plan = |disk| UnikernelPlan { kernel: "/disk.img".into(), disk: Some(disk), ..plan() };
        for disk in [DiskSource::File("/disk.img".into()), DiskSource::Root] {
            let files = Files::extract(&plan(disk.clone()), &tree, scratch.path()).unwrap();
            let about = files.disk.as_ref().unwrap().metadata().unwrap();
            let place = std::fs::metadata(scratch.path()).unwrap();
            assert_eq!((about.dev(), about.nlink()), (place.dev(), 0), "{disk:?}");
            assert!(
                about.blocks() * 512 < 16 * PIECE as u64,
                "{disk:?}: {} blocks",
                about.blocks()
            );
            assert_ne!(files.kernel.metadata().unwrap().dev(), place.dev());
            let mut copy = Vec::new();
            files.disk.unwrap().read_to_end(&mut copy).unwrap();
            assert!(disk == DiskSource::Root || copy == content);
        }
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing is left there");
        // What does not fit is said.
        let nowhere = Files::extract(&plan(DiskSource::Root), &tree, Path::new("/no/such"));
        assert!(nowhere.unwrap_err().to_string().contains("No such file"));
    }
}
