//! Files that are loaded beside a kernel: an initramfs, or a multiboot or PVH kernel's modules.

use std::io;

use mvm_memory::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::{Error, Section};

/// A file that is loaded beside the kernel.
#[derive(Debug)]
pub struct Module {
    /// What is loaded.
    pub content: Section,
    /// What a kernel with modules is told of it: its name, and words of the user's. Without NUL.
    pub text: String,
}

impl Module {
    /// The same once more.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { content: self.content.try_clone()?, text: self.text.clone() })
    }

    /// Bytes of guest memory from its first page to the end of its last.
    fn pages(&self) -> u64 {
        // A file's size is below 2^63.
        self.content.size().next_multiple_of(PAGE_SIZE as u64)
    }
}

/// An initramfs is a module of which nothing more is said.
impl From<Section> for Module {
    fn from(content: Section) -> Self {
        Self { content, text: String::new() }
    }
}

/// Where a module lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded<'a> {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// [`Module::text`].
    pub text: &'a str,
}

impl Loaded<'_> {
    /// First address after it.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Guest memory that `modules` take, each on pages of its own; `None` if no machine has that much.
pub fn total(modules: &[Module]) -> Option<u64> {
    modules.iter().try_fold(0u64, |sum, module| sum.checked_add(module.pages()))
}

/// Where `modules` lie if the first one is at `start`.
pub fn layout(modules: &[Module], start: u64) -> Vec<Loaded<'_>> {
    let mut at = start;
    let mut loaded = Vec::new();
    for module in modules {
        loaded.push(Loaded { start: at, len: module.content.size(), text: &module.text });
        at += module.pages();
    }
    loaded
}

/// Copies `modules` into guest memory, the first one to `start`.
///
/// # Errors
/// One cannot be read.
pub fn load(modules: Vec<Module>, start: u64, ram: &GuestRam) -> Result<(), Error> {
    let mut at = start;
    for mut module in modules {
        let pages = module.pages();
        // There is room for all of them: it is no more than guest memory has.
        let len = module.content.size() as usize;
        ram.memory()
            .read_exact_volatile_from(GuestAddress(at), &mut module.content, len)
            .map_err(|e| Error::Read { what: "the initramfs", source: io::Error::other(e) })?;
        at += pages;
    }
    Ok(())
}
