//! What the device has to tell, by number.

use std::collections::BTreeMap;
use std::fmt;

/// The numbers of items that have a meaning of their own. Those of several bytes are little-endian
/// integers unless it says otherwise.
pub mod key {
    /// The letters "QEMU".
    pub const SIGNATURE: u16 = 0x00;
    /// 32 bits: bit 0 for the two ports, bit 1 for DMA.
    pub const ID: u16 = 0x01;
    /// 64 bits: bytes of RAM.
    pub const RAM_SIZE: u16 = 0x03;
    /// 16 bits: whether there is no screen.
    pub const NO_GRAPHIC: u16 = 0x04;
    /// 16 bits: number of processors.
    pub const NB_CPUS: u16 = 0x05;
    /// 32 bits: where the initrd is.
    pub const INITRD_ADDRESS: u16 = 0x0a;
    /// 32 bits: its bytes.
    pub const INITRD_SIZE: u16 = 0x0b;
    /// 16 bits: the most processors that there could be, or their highest APIC id and one.
    pub const MAX_CPUS: u16 = 0x0f;
    /// The initrd itself.
    pub const INITRD_DATA: u16 = 0x12;
    /// 32 bits: where the command line is.
    pub const CMDLINE_ADDRESS: u16 = 0x13;
    /// 32 bits: its bytes, final NUL included.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// The command line itself, final NUL included.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// The directory of files: their number, then an entry for each; big-endian.
    pub const FILE_DIRECTORY: u16 = 0x19;
    /// The first file.
    pub const FILE_FIRST: u16 = 0x20;
}

/// Both ways of reading are there.
const FEATURES: u32 = 0b11;

/// Bytes of a file's name with its final NUL.
const NAME_SIZE: usize = 56;

/// Most files.
const FILES_MAX: usize = 64;

/// Bytes of an item.
pub trait Content: Send {
    /// How many there are.
    fn size(&self) -> u64;

    /// Reads as many from `offset` on as there are, at most as `buf` holds. What cannot be read is
    /// left as it is in `buf`.
    fn read_at(&self, offset: u64, buf: &mut [u8]);
}

impl Content for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) {
        let rest = usize::try_from(offset).ok().and_then(|at| self.get(at..)).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
    }
}

impl<T: Content + 'static> From<T> for Box<dyn Content> {
    fn from(content: T) -> Self {
        Box::new(content)
    }
}

/// All items of a device.
pub struct Items {
    items: BTreeMap<u16, Box<dyn Content>>,
    /// Number and name of each file.
    files: Vec<(u16, String)>,
}

impl Default for Items {
    fn default() -> Self {
        let mut items = Self { items: BTreeMap::new(), files: Vec::new() };
        items.set(key::SIGNATURE, b"QEMU".to_vec().into());
        items.set(key::ID, FEATURES.to_le_bytes().to_vec().into());
        items.list_files();
        items
    }
}

impl Items {
    /// Puts `content` at `number`.
    pub fn set(&mut self, number: u16, content: Box<dyn Content>) {
        self.items.insert(number, content);
    }

    /// Adds a file to the directory. Returns whether there was room.
    pub fn add_file(&mut self, name: &str, content: Box<dyn Content>) -> bool {
        if self.files.len() >= FILES_MAX || name.len() >= NAME_SIZE {
            return false;
        }
        let number = key::FILE_FIRST + self.files.len() as u16;
        self.set(number, content);
        self.files.push((number, name.to_owned()));
        self.list_files();
        true
    }

    /// Reads from an item, or leaves `buf` as it is where there is nothing.
    pub fn read(&self, number: u16, offset: u64, buf: &mut [u8]) {
        let Some(content) = self.items.get(&number) else { return };
        let left = content.size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        if len > 0 {
            content.read_at(offset, &mut buf[..len]);
        }
    }

    /// Writes the directory anew.
    fn list_files(&mut self) {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (number, name) in &self.files {
            let size = self.items.get(number).map_or(0, |content| content.size());
            directory.extend(u32::try_from(size).unwrap_or(u32::MAX).to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = name.as_bytes().to_vec();
            field.resize(NAME_SIZE, 0);
            directory.extend(field);
        }
        self.set(key::FILE_DIRECTORY, directory.into());
    }
}

impl fmt::Debug for Items {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = self.items.iter().map(|(number, content)| (number, content.size()));
        f.debug_map().entries(sizes).finish()
    }
}
