//! The tree that the guest sees: a directory of shares, each a passthrough file system of its own.
//!
//! An inode number is the share's place in the table (8 bits) and its number in the share (56 bits);
//! place 0 is the root directory. Numbers and handles come from a guest that may be hostile: each share
//! looks them up among those it gave out, so nothing outside of a share can be named. Names are checked
//! here once more: single components, never `..`.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};

use crate::protocol::{Cache, ShareOptions, check_name};
use crate::room::{Room, is_full};
use crate::tree;

/// Most shares at a time.
pub(crate) const MAX_SHARES: usize = 254;

const ROOT: u64 = 1;
const SHIFT: u32 = 56;
const INNER: u64 = (1 << SHIFT) - 1;

/// Longest value and list of extended attributes (xattr(7)).
const MAX_XATTR: u32 = 64 << 10;

/// How long names and attributes of a live tree hold.
const LIVE: Duration = Duration::from_secs(1);

/// How long those of a tree that nobody else changes do.
const EXCLUSIVE: Duration = Duration::from_secs(24 * 3600);

/// What is offered to the guest's kernel. Locks are not among it: they are the guest's own.
const OFFERED: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::READDIRPLUS_AUTO)
    .union(FsOptions::ASYNC_DIO)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::CACHE_SYMLINKS)
    .union(FsOptions::HANDLE_KILLPRIV_V2);

/// Why a share was not made or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No name for a share.
    #[error("{0:?} cannot be the name of a share")]
    Name(String),
    /// There is one already.
    #[error("there is a share {0:?} already")]
    Taken(String),
    /// There is none.
    #[error("there is no share {0:?}")]
    Unknown(String),
    /// The table is full.
    #[error("there can be {MAX_SHARES} shares at a time")]
    Full,
    /// The tree is no directory.
    #[error("what is to be shared as {0:?} is no directory")]
    NoDirectory(String),
    /// The host refuses.
    #[error("cannot serve the share {name:?}: {source}")]
    Serve {
        /// Its name.
        name: String,
        /// What the host said.
        source: io::Error,
    },
}

/// One share. The lock is held for writing only when the share ends, which so waits for whoever is
/// still in it.
struct Share {
    name: String,
    read_only: bool,
    /// The host changes it too, and may have something mounted in it.
    live: bool,
    fs: RwLock<Option<Tree>>,
}

struct Tree {
    fs: PassthroughFs,
    /// Keeps a detached tree together: with this descriptor it falls apart.
    _tree: tree::Tree,
}

#[derive(Default)]
struct Table {
    shares: BTreeMap<u8, Arc<Share>>,
    /// The place given out last: places are used again as late as possible, since the guest may
    /// remember numbers.
    last: u8,
}

/// All shares.
pub(crate) struct Shares {
    table: RwLock<Table>,
    /// What the guest's kernel can do, once it has said so.
    capable: Mutex<Option<FsOptions>>,
    squash: bool,
    room: Room,
}

impl Shares {
    /// No shares. With `squash` every identity of the guest is that of the server.
    pub fn new(squash: bool) -> Self {
        let (table, capable) = (RwLock::default(), Mutex::new(None));
        Self { table, capable, squash, room: Room::default() }
    }

    /// Shares the directory `root` as `name`.
    pub fn add(&self, name: &str, tree: tree::Tree, options: ShareOptions) -> Result<(), Error> {
        if !check_name(name) {
            return Err(Error::Name(name.into()));
        }
        if !tree::is_directory(tree.as_fd()) {
            return Err(Error::NoDirectory(name.into()));
        }
        let serve = |source| Error::Serve { name: name.into(), source };
        let fs = PassthroughFs::new(config(tree.as_fd(), options)).map_err(serve)?;
        // What the guest can do is settled once, by its first message.
        let capable = self.capable.lock().unwrap_or_else(PoisonError::into_inner);
        match *capable {
            Some(capable) => drop(fs.init(capable).map_err(serve)?),
            None => fs.import().map_err(serve)?,
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.shares.values().any(|share| share.name == name) {
            return Err(Error::Taken(name.into()));
        }
        if table.shares.len() >= MAX_SHARES {
            return Err(Error::Full);
        }
        let mut place = table.last;
        loop {
            place = place.checked_add(1).unwrap_or(1);
            if !table.shares.contains_key(&place) {
                break;
            }
        }
        table.last = place;
        let fs = RwLock::new(Some(Tree { fs, _tree: tree }));
        let live = options.cache == Cache::Live;
        let share = Share { name: name.into(), read_only: options.read_only, live, fs };
        table.shares.insert(place, Arc::new(share));
        Ok(())
    }

    /// Ends the share `name` once nobody is in it.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let place = table.shares.iter().find(|(_, share)| share.name == name).map(|(p, _)| *p);
        let share = place.and_then(|place| table.shares.remove(&place));
        drop(table);
        let share = share.ok_or_else(|| Error::Unknown(name.into()))?;
        *share.fs.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.room.given_back();
        Ok(())
    }

    /// Names of all shares, sorted.
    pub fn names(&self) -> Vec<String> {
        let table = self.table();
        let mut names: Vec<_> = table.shares.values().map(|share| share.name.clone()).collect();
        names.sort();
        names
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Share>> {
        self.table().shares.values().cloned().collect()
    }

    /// Runs `f` in the share of `inode`, with the inode's number there; again if there was no descriptor for it.
    fn within<R>(
        &self,
        inode: u64,
        mut f: impl FnMut(&PassthroughFs, u64, u64) -> io::Result<R>,
    ) -> io::Result<R> {
        // Outside of the share's lock: a share may end while somebody waits.
        self.room.find(|| self.once_within(inode, &mut f))
    }

    fn once_within<R>(
        &self,
        inode: u64,
        f: impl FnOnce(&PassthroughFs, u64, u64) -> io::Result<R>,
    ) -> io::Result<R> {
        let place = (inode >> SHIFT) as u8;
        let share = self.table().shares.get(&place).cloned().ok_or_else(|| {
            // The root directory has nothing but shares in it; and a share may have ended.
            errno(if place == 0 { libc::EPERM } else { libc::ESTALE })
        })?;
        let tree = share.fs.read().unwrap_or_else(PoisonError::into_inner);
        let tree = tree.as_ref().ok_or_else(|| errno(libc::ESTALE))?;
        f(&tree.fs, inode & INNER, inode & !INNER)
    }

    /// The same for what changes something.
    fn change<R>(
        &self,
        inode: u64,
        f: impl FnMut(&PassthroughFs, u64, u64) -> io::Result<R>,
    ) -> io::Result<R> {
        let share = self.table().shares.get(&((inode >> SHIFT) as u8)).cloned();
        if share.is_some_and(|share| share.read_only) {
            return Err(errno(libc::EROFS));
        }
        self.within(inode, f)
    }

    /// The same for what makes a new name, which must not be there if it fails: it is sure of descriptors before it begins.
    fn make<R>(
        &self,
        inode: u64,
        f: impl FnMut(&PassthroughFs, u64, u64) -> io::Result<R>,
    ) -> io::Result<R> {
        self.room.ensure()?;
        self.change(inode, f)
    }

    /// Refuses to take away a directory on which something is mounted: the kernel would let go of the host's mount with it, since in
    /// the server's own mount namespace there is none (rmdir(2), EBUSY).
    fn check_mount_point(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let share = self.table().shares.get(&((parent >> SHIFT) as u8)).cloned();
        if !share.is_some_and(|share| share.live) {
            return Ok(());
        }
        self.within(parent, |fs, parent, _| {
            let entry = match fs.lookup(ctx, parent, name) {
                Ok(entry) => entry,
                Err(e) if is_full(&e) => return Err(e),
                Err(_) => return Ok(()),
            };
            let above = fs.getattr(ctx, parent, None);
            fs.forget(ctx, entry.inode, 1);
            // What is mounted of the same file system cannot be told apart.
            let is_directory = entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR;
            match above {
                Ok((above, _)) if is_directory && above.st_dev != entry.attr.st_dev => {
                    Err(errno(libc::EBUSY))
                }
                _ => Ok(()),
            }
        })
    }

    /// The entry of a share in the root directory.
    fn entry(&self, ctx: &Context, place: u8, share: &Share) -> io::Result<Entry> {
        let tree = share.fs.read().unwrap_or_else(PoisonError::into_inner);
        let tree = tree.as_ref().ok_or_else(|| errno(libc::ENOENT))?;
        let (attr, _) = tree.fs.getattr(ctx, ROOT, None)?;
        let base = u64::from(place) << SHIFT;
        // Looked up each time: it may end any time.
        let entry = Entry { inode: ROOT, attr, ..Entry::default() };
        Ok(outer(entry, base))
    }

    fn listed(&self, offset: u64) -> Vec<(u64, u8, Arc<Share>)> {
        let table = self.table();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let all =
            table.shares.iter().enumerate().skip_while(|(_, (p, _))| usize::from(**p) <= from);
        all.map(|(_, (place, share))| (u64::from(*place), *place, share.clone())).collect()
    }
}

fn config(root: BorrowedFd<'_>, options: ShareOptions) -> Config {
    let (timeout, cache_policy) = match options.cache {
        Cache::Live => (LIVE, CachePolicy::Auto),
        Cache::Exclusive => (EXCLUSIVE, CachePolicy::Always),
    };
    Config {
        // The dot: the link itself would not be followed.
        root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        xattr: true,
        killpriv_v2: true,
        // Numbers that stay the same, however often the guest forgets the file.
        use_host_ino: true,
        ..Config::default()
    }
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Runs `list`, which looks each name up, again if the first one was gone before that: the library says so in place of a list.
/// A directory that is gone itself says the same, to the end.
fn still_there(mut list: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    const GONE_IN_A_ROW: usize = 16;
    for _ in 1..GONE_IN_A_ROW {
        match list() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            done => return done,
        }
    }
    list()
}

/// A name that stays in its directory.
fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// What a share says of an inode, with the numbers that the guest knows.
fn outer(mut entry: Entry, base: u64) -> Entry {
    entry.inode |= base;
    entry.attr.st_ino = entry.inode;
    entry
}

fn attributes(inode: u64, (mut attr, timeout): (stat64, Duration)) -> (stat64, Duration) {
    attr.st_ino = inode;
    (attr, timeout)
}

fn root_attributes() -> stat64 {
    // SAFETY: zeros are a valid value of this structure of numbers.
    let mut attr: stat64 = unsafe { std::mem::zeroed() };
    attr.st_ino = ROOT;
    attr.st_mode = libc::S_IFDIR | 0o755;
    attr.st_nlink = 2;
    attr.st_blksize = 4096;
    attr
}

/// Whether opening with these flags may change the file.
fn writes(flags: u32) -> bool {
    let flags = flags.cast_signed();
    flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0
}

/// Flags that make no sense for a file that is there, or would make another one.
fn plain_open(flags: u32) -> u32 {
    flags & !(libc::O_TMPFILE & !libc::O_DIRECTORY | libc::O_PATH | libc::O_CREAT).cast_unsigned()
}

impl FileSystem for Shares {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // Held while shares are told, so that none is added meanwhile and not told.
        let mut known = self.capable.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(capable);
        for share in self.all() {
            let tree = share.fs.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(tree) = tree.as_ref() {
                tree.fs.init(capable)?;
            }
        }
        Ok(OFFERED)
    }

    fn destroy(&self) {
        for share in self.all() {
            let tree = share.fs.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(tree) = tree.as_ref() {
                tree.fs.destroy();
            }
        }
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        if parent != ROOT {
            return self.within(parent, |fs, parent, base| {
                fs.lookup(ctx, parent, name).map(|entry| outer(entry, base))
            });
        }
        let table = self.table();
        let found = table.shares.iter().find(|(_, s)| s.name.as_bytes() == name.to_bytes());
        let (place, share) =
            found.map(|(p, s)| (*p, s.clone())).ok_or_else(|| errno(libc::ENOENT))?;
        drop(table);
        self.entry(ctx, place, &share)
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        // A share that has ended has forgotten everything.
        let _ = self.within(inode, |fs, inode, _| {
            fs.forget(ctx, inode, count);
            Ok(())
        });
        self.room.given_back();
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        if inode == ROOT {
            return Ok((root_attributes(), LIVE));
        }
        let found = self.within(inode, |fs, inode, _| fs.getattr(ctx, inode, handle));
        found.map(|found| attributes(inode, found))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let set = self.change(inode, |fs, inode, _| fs.setattr(ctx, inode, attr, handle, valid));
        set.map(|found| attributes(inode, found)).map_err(|e| {
            // An owner whom the server's user namespace does not know.
            let owner = valid.intersects(SetattrValid::UID | SetattrValid::GID);
            if self.squash && owner && e.raw_os_error() == Some(libc::EINVAL) {
                return errno(libc::EPERM);
            }
            e
        })
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.within(inode, |fs, inode, _| fs.readlink(ctx, inode))
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        self.make(parent, |fs, parent, base| {
            fs.symlink(ctx, target, parent, name).map(|entry| outer(entry, base))
        })
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        component(name)?;
        self.make(parent, |fs, parent, base| {
            fs.mknod(ctx, parent, name, mode, rdev, umask).map(|entry| outer(entry, base))
        })
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        component(name)?;
        self.make(parent, |fs, parent, base| {
            fs.mkdir(ctx, parent, name, mode, umask).map(|entry| outer(entry, base))
        })
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.change(parent, |fs, parent, _| fs.unlink(ctx, parent, name))
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.check_mount_point(ctx, parent, name)?;
        self.change(parent, |fs, parent, _| fs.rmdir(ctx, parent, name))
    }

    fn rename(
        &self,
        ctx: &Context,
        from: u64,
        old: &CStr,
        to: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        component(old)?;
        component(new)?;
        if from >> SHIFT != to >> SHIFT {
            return Err(errno(libc::EXDEV));
        }
        self.check_mount_point(ctx, from, old)?;
        self.check_mount_point(ctx, to, new)?;
        self.change(from, |fs, from, _| fs.rename(ctx, from, old, to & INNER, new, flags))
    }

    fn link(&self, ctx: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        if inode >> SHIFT != parent >> SHIFT {
            return Err(errno(libc::EXDEV));
        }
        self.make(parent, |fs, parent, base| {
            fs.link(ctx, inode & INNER, parent, name).map(|entry| outer(entry, base))
        })
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let open =
            |fs: &PassthroughFs, inode, _| fs.open(ctx, inode, plain_open(flags), fuse_flags);
        if writes(flags) { self.change(inode, open) } else { self.within(inode, open) }
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        component(name)?;
        // A flag that says "only the name" would follow a link at the end of the path.
        let flags = (plain_open(args.flags).cast_signed() | libc::O_NOFOLLOW).cast_unsigned();
        let args = CreateIn { flags, ..args };
        self.make(parent, |fs, parent, base| {
            let (entry, handle, options, backing) = fs.create(ctx, parent, name, args)?;
            Ok((outer(entry, base), handle, options, backing))
        })
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.within(inode, |fs, inode, _| {
            fs.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
        })
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.change(inode, |fs, inode, _| {
            let owner = lock_owner;
            fs.write(ctx, inode, handle, r, size, offset, owner, delayed, flags, fuse_flags)
        })
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.within(inode, |fs, inode, _| fs.flush(ctx, inode, handle, lock_owner))
    }

    fn fsync(&self, ctx: &Context, inode: u64, data: bool, handle: u64) -> io::Result<()> {
        self.within(inode, |fs, inode, _| fs.fsync(ctx, inode, data, handle))
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.change(inode, |fs, inode, _| fs.fallocate(ctx, inode, handle, mode, offset, length))
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let released = self.within(inode, |fs, inode, _| {
            fs.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
        });
        self.room.given_back();
        released
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        if inode == ROOT {
            // SAFETY: zeros are a valid value of this structure of numbers.
            let mut out: statvfs64 = unsafe { std::mem::zeroed() };
            (out.f_bsize, out.f_namemax) = (4096, 255);
            return Ok(out);
        }
        self.within(inode, |fs, inode, _| fs.statfs(ctx, inode))
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.change(inode, |fs, inode, _| fs.setxattr(ctx, inode, name, value, flags))
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        if inode == ROOT {
            return Err(errno(libc::ENODATA));
        }
        // The size is what will be allocated.
        let size = size.min(MAX_XATTR);
        self.within(inode, |fs, inode, _| fs.getxattr(ctx, inode, name, size))
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        if inode == ROOT {
            return Ok(ListxattrReply::Count(0));
        }
        let size = size.min(MAX_XATTR);
        self.within(inode, |fs, inode, _| fs.listxattr(ctx, inode, size))
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.change(inode, |fs, inode, _| fs.removexattr(ctx, inode, name))
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        if inode == ROOT {
            return Ok((None, OpenOptions::empty()));
        }
        self.within(inode, |fs, inode, _| fs.opendir(ctx, inode, plain_open(flags)))
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if inode == ROOT {
            for (offset, place, share) in self.listed(offset) {
                let ino = u64::from(place) << SHIFT | ROOT;
                let (type_, name) = (u32::from(libc::DT_DIR), share.name.as_bytes());
                if add(DirEntry { ino, offset, type_, name })? == 0 {
                    break;
                }
            }
            return Ok(());
        }
        self.within(inode, |fs, inode, base| {
            still_there(|| {
                fs.readdir(ctx, inode, handle, size, offset, &mut |mut entry| {
                    entry.ino |= base;
                    add(entry)
                })
            })
        })
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if inode == ROOT {
            for (offset, place, share) in self.listed(offset) {
                let Ok(entry) = self.entry(ctx, place, &share) else { continue };
                let (type_, name) = (u32::from(libc::DT_DIR), share.name.as_bytes());
                if add(DirEntry { ino: entry.inode, offset, type_, name }, entry)? == 0 {
                    break;
                }
            }
            return Ok(());
        }
        self.within(inode, |fs, inode, base| {
            still_there(|| {
                fs.readdirplus(ctx, inode, handle, size, offset, &mut |mut listed, entry| {
                    let entry = outer(entry, base);
                    listed.ino = entry.inode;
                    add(listed, entry)
                })
            })
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, data: bool, handle: u64) -> io::Result<()> {
        if inode == ROOT {
            return Ok(());
        }
        self.within(inode, |fs, inode, _| fs.fsyncdir(ctx, inode, data, handle))
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        if inode == ROOT {
            return Ok(());
        }
        let released = self.within(inode, |fs, inode, _| fs.releasedir(ctx, inode, flags, handle));
        self.room.given_back();
        released
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        if inode == ROOT {
            return Ok(());
        }
        self.within(inode, |fs, inode, _| fs.access(ctx, inode, mask))
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.within(inode, |fs, inode, _| fs.lseek(ctx, inode, handle, offset, whence))
    }

    fn id_remap(&self, ctx: &mut Context) -> io::Result<()> {
        if self.squash {
            (ctx.uid, ctx.gid) = (0, 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_gone_does_not_end_a_list() {
        let mut tries = 0;
        let mut after = |gone| {
            tries = 0;
            let listed = still_there(|| {
                tries += 1;
                if tries <= gone { Err(errno(libc::ENOENT)) } else { Ok(()) }
            });
            (listed.is_ok(), tries)
        };
        assert_eq!([after(0), after(3), after(1000)], [(true, 1), (true, 4), (false, 16)]);
        assert!(still_there(|| Err(errno(libc::EIO))).is_err());
    }
}
