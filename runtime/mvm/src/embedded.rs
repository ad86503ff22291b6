//! The guest's kernel, its module and the initramfs carried in this file.
//!
//! The build script puts them into the executable on page boundaries. Kernel and initramfs are handed to the
//! monitor as a piece of `/proc/self/exe`: nothing is copied, and all machines share the page cache.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use mvm_sandbox::machine::Payload;

/// Bytes that begin on a page.
#[repr(C, align(4096))]
#[allow(dead_code)] // Unused when nothing is built in.
struct Aligned<T: ?Sized>(T);

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The kernel: a file of the user's choice or the built-in one.
pub fn kernel(chosen: Option<&Path>) -> anyhow::Result<Payload> {
    choose("kernel", "--kernel", chosen, KERNEL)
}

/// The initramfs: a file of the user's choice or the built-in one.
pub fn initramfs(chosen: Option<&Path>) -> anyhow::Result<Payload> {
    choose("initramfs", "--initrd", chosen, INITRAMFS)
}

/// The module that makes the kernel mount file systems of the type `kind`, if that is not in the kernel itself. Only the
/// built-in kernel has one.
pub fn file_system(kind: &str, chosen: Option<&Path>) -> Option<&'static [u8]> {
    match (kind, chosen) {
        ("xfs", None) => XFS,
        _ => None,
    }
}

/// Sizes of what is built in.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// The kernel's, in bytes.
    pub kernel: Option<usize>,
    /// The initramfs's, in bytes.
    pub initramfs: Option<usize>,
    /// That of the module for XFS, in bytes.
    pub xfs: Option<usize>,
}

/// Sizes of what is built in.
pub fn sizes() -> Sizes {
    let len = |part: Option<&[u8]>| part.map(<[u8]>::len);
    Sizes { kernel: len(KERNEL), initramfs: len(INITRAMFS), xfs: len(XFS) }
}

fn choose(
    what: &str,
    flag: &str,
    chosen: Option<&Path>,
    built_in: Option<&'static [u8]>,
) -> anyhow::Result<Payload> {
    match (chosen, built_in) {
        (Some(path), _) => {
            let file = File::open(path)
                .with_context(|| format!("cannot open the {what} {}", path.display()))?;
            let kind = file.metadata()?.file_type();
            if !kind.is_file() {
                bail!("the {what} {} is not a file", path.display());
            }
            Ok(Payload::file(file))
        }
        (None, Some(bytes)) => piece_of_self(bytes)
            .with_context(|| format!("cannot find the built-in {what} in /proc/self/exe")),
        (None, None) => Err(anyhow!(
            "this mvm was built without a guest {what}; give one by `{flag} FILE`, or build it in \
             by `make`"
        )),
    }
}

/// Where in our own executable file `bytes` lie, found by the mapping that they are in.
fn piece_of_self(bytes: &'static [u8]) -> anyhow::Result<Payload> {
    let maps = fs::read_to_string("/proc/self/maps").context("cannot read /proc/self/maps")?;
    let address = bytes.as_ptr() as u64;
    let (start, offset) = maps
        .lines()
        .filter_map(parse_mapping)
        .find(|(start, end, _)| (*start..*end).contains(&address))
        .map(|(start, _, offset)| (start, offset))
        .ok_or_else(|| anyhow!("address {address:#x} is in no mapping"))?;
    let file = File::open("/proc/self/exe").context("cannot open /proc/self/exe")?;
    Ok(Payload { file, offset: address - start + offset, len: Some(bytes.len() as u64) })
}

/// Start, end and file offset of a line of `/proc/PID/maps`.
fn parse_mapping(line: &str) -> Option<(u64, u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let offset = fields.nth(1)?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(start)?, hex(end)?, hex(offset)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    static SAMPLE: Aligned<[u8; 27]> = Aligned(*b"a piece of this executable\n");

    #[test]
    fn piece_of_the_executable_is_found_in_its_file() {
        let payload = piece_of_self(&SAMPLE.0).unwrap();
        let mut bytes = vec![0; SAMPLE.0.len()];
        payload.file.read_exact_at(&mut bytes, payload.offset).unwrap();
        assert_eq!(bytes, SAMPLE.0);
        assert_eq!(payload.offset % 4096, 0);
    }

    #[test]
    fn only_the_built_in_kernel_has_a_module() {
        assert_eq!(file_system("xfs", None), XFS);
        assert_eq!(file_system("xfs", Some(Path::new("/boot/vmlinux"))), None);
        assert_eq!(file_system("ext4", None), None, "it is in the kernel");
    }

    #[test]
    fn missing_and_strange_files_are_named() {
        let e = kernel(Some(Path::new("/no/such/kernel"))).unwrap_err();
        assert!(format!("{e:#}").contains("/no/such/kernel"));
        let e = kernel(Some(Path::new("/"))).unwrap_err();
        assert!(e.to_string().contains("not a file"));
    }
}
