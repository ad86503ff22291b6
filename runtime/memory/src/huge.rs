//! Huge pages of the host: what there is of them, and what to do if there is not.
//!
//! Linux, Documentation/admin-guide/mm/hugetlbpage.rst and transhuge.rst.

use std::path::Path;
use std::{fs, io};

use vm_memory::MmapRegion;

use crate::PageTracker;

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The host's pool of pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Whether shared memory is made of huge pages.
const SHARED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The host's pool of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Pages that are not used.
    pub free: u64,
    /// Of those, pages that somebody has reserved.
    pub reserved: u64,
    /// All pages.
    pub total: u64,
}

impl Pool {
    /// What the host says now, if it says anything.
    pub fn read() -> Option<Self> {
        let number =
            |name| fs::read_to_string(Path::new(POOL).join(name)).ok()?.trim().parse().ok();
        Some(Self {
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
            total: number("nr_hugepages")?,
        })
    }
}

/// Why there is no memory of huge pages, and what to do.
pub fn shortage(needed: u64, pool: Option<Pool>) -> String {
    let remedy = |n: u64| {
        format!("reserve them with `sudo sysctl vm.nr_hugepages={n}`, or run without huge pages")
    };
    match pool {
        Some(Pool { free, reserved, total }) => {
            let left = free.saturating_sub(reserved);
            let enough = total.saturating_add(needed.saturating_sub(left));
            format!(
                "the guest's memory takes {needed} huge pages of 2 MiB, and this host has {left} to give (of {total}): {}",
                remedy(enough)
            )
        }
        None => format!(
            "the guest's memory takes {needed} huge pages of 2 MiB, and this host has fewer to give: {}",
            remedy(needed)
        ),
    }
}

/// Whether shared memory that asks for huge pages gets them; what the host says if not.
pub fn check_transparent() -> Result<(), String> {
    let text = fs::read_to_string(SHARED).map_err(|e| format!("{SHARED}: {e}"))?;
    match chosen(&text) {
        Some("never" | "deny") | None => Err(text.trim().to_owned()),
        Some(_) => Ok(()),
    }
}

/// The word in brackets.
fn chosen(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

/// Why there are no transparent huge pages, and what to do.
pub fn no_transparent(found: &str) -> String {
    format!(
        "this host does not make shared memory of transparent huge pages ({found}): allow it with \
         `echo advise | sudo tee {SHARED}`, or run without huge pages"
    )
}

/// Asks for huge pages in a mapping.
pub fn advise(mapping: &MmapRegion<PageTracker>) -> io::Result<()> {
    // SAFETY: the range is the mapping, which outlives the call; the advice changes what pages it is made of, not
    // what is in them.
    let rc = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_told_with_numbers_and_remedy() {
        let pool = Pool { free: 12, reserved: 2, total: 20 };
        assert_eq!(
            shortage(256, Some(pool)),
            "the guest's memory takes 256 huge pages of 2 MiB, and this host has 10 to give (of 20): reserve them \
             with `sudo sysctl vm.nr_hugepages=266`, or run without huge pages"
        );
        assert!(shortage(256, None).contains("nr_hugepages=256"));
    }

    #[test]
    fn the_hosts_choice_is_the_word_in_brackets() {
        assert_eq!(chosen("always within_size [advise] never deny force\n"), Some("advise"));
        assert_eq!(chosen("always never"), None);
    }
}
