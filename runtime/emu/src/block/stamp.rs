//! The generation of a code page, at hand without a look-up.

use std::ptr::NonNull;

use mvm_memory::CodePage;

/// A code page and the generation under which it was decoded.
///
/// Lives in a [`super::cache::BlockCache`] or a [`Store`](crate::jit::Store), which keep the machine's memory, and with it the
/// page's record, alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeStamp {
    page: Option<NonNull<CodePage>>,
    generation: u32,
}

// SAFETY: `CodePage` is atomics; the pointer is only read through a shared reference.
unsafe impl Send for CodeStamp {}
// SAFETY: as above.
unsafe impl Sync for CodeStamp {}

impl CodeStamp {
    /// One that is not current.
    pub fn never() -> Self {
        Self { page: None, generation: 0 }
    }

    /// # Safety
    /// `page` outlives the stamp.
    pub unsafe fn new(page: &CodePage, generation: u32) -> Self {
        Self { page: Some(NonNull::from(page)), generation }
    }

    /// Has nothing been written to the code since?
    #[inline(always)]
    pub fn is_current(&self) -> bool {
        match self.page {
            // SAFETY: the constructor's promise.
            Some(page) => unsafe { page.as_ref() }.generation() == self.generation,
            None => false,
        }
    }
}
