//! The side of a local APIC that other threads see.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

/// NMIs that a processor can hold: one on its way to the handler, and one behind it.
pub(crate) const NMIS_MAX: u8 = 2;

use crate::sys::attention::{Attention, reason};

/// How a local APIC is addressed (IA32_APIC_BASE bits 10 and 11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ApicMode {
    /// Globally disabled.
    Disabled = 0,
    /// Registers in a page of memory.
    XApic = 1,
    /// Registers in MSRs.
    X2Apic = 2,
}

/// A set of interrupt vectors that any thread may change.
#[derive(Debug, Default)]
pub struct VectorSet([AtomicU32; 8]);

impl VectorSet {
    fn place(&self, vector: u8) -> (&AtomicU32, u32) {
        (&self.0[usize::from(vector >> 5)], 1 << (vector & 31))
    }

    /// Adds `vector`; false if it was there already.
    pub fn insert(&self, vector: u8) -> bool {
        let (word, bit) = self.place(vector);
        word.fetch_or(bit, Ordering::SeqCst) & bit == 0
    }

    /// Removes `vector`; false if it was not there.
    pub fn remove(&self, vector: u8) -> bool {
        let (word, bit) = self.place(vector);
        word.fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }

    /// Is `vector` in the set?
    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = self.place(vector);
        word.load(Ordering::SeqCst) & bit != 0
    }

    /// The highest vector of the set.
    pub fn highest(&self) -> Option<u8> {
        (0..8u8).rev().find_map(|i| {
            let word = self.0[usize::from(i)].load(Ordering::SeqCst);
            (word != 0).then(|| i * 32 + (31 - word.leading_zeros() as u8))
        })
    }

    /// Word `index` of the register that shows the set.
    pub fn word(&self, index: usize) -> u32 {
        self.0.get(index).map_or(0, |w| w.load(Ordering::SeqCst))
    }

    /// Sets word `index`.
    pub fn set_word(&self, index: usize, value: u32) {
        if let Some(word) = self.0.get(index) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Removes everything.
    pub fn clear(&self) {
        for word in &self.0 {
            word.store(0, Ordering::SeqCst);
        }
    }
}

/// The letter box of one local APIC: requests that wait, and what senders need to know to find
/// their addressee.
#[derive(Debug)]
pub struct Port {
    /// x2APIC id, and initial xAPIC id.
    pub id: u32,
    /// How to reach the vCPU.
    pub attention: Attention,
    /// Interrupts requested.
    pub irr: VectorSet,
    /// Which of them are level-triggered.
    pub tmr: VectorSet,
    mode: AtomicU8,
    software_enabled: AtomicBool,
    logical_id: AtomicU32,
    flat: AtomicBool,
    sipi: AtomicU8,
    nmis: AtomicU8,
    bad_vector: AtomicBool,
    intr: AtomicBool,
}

impl Port {
    /// The port of the vCPU with APIC id `id`, as after reset.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            attention: Attention::default(),
            irr: VectorSet::default(),
            tmr: VectorSet::default(),
            mode: AtomicU8::new(ApicMode::XApic as u8),
            software_enabled: AtomicBool::new(false),
            logical_id: AtomicU32::new(0),
            flat: AtomicBool::new(true),
            sipi: AtomicU8::new(0),
            nmis: AtomicU8::new(0),
            bad_vector: AtomicBool::new(false),
            intr: AtomicBool::new(false),
        }
    }

    /// Requests interrupt `vector`. A request that is there already absorbs it; vectors below 16 are an error.
    pub fn post(&self, vector: u8, level: bool) {
        if !self.software_enabled.load(Ordering::SeqCst) {
            return;
        }
        if vector < 16 {
            self.bad_vector.store(true, Ordering::SeqCst);
            self.attention.raise(reason::INTERRUPT);
            return;
        }
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        if self.irr.insert(vector) {
            self.attention.raise(reason::INTERRUPT);
        }
    }

    /// INTR changes, which is wired to LINT0.
    pub fn set_intr(&self, asserted: bool) {
        self.intr.store(asserted, Ordering::SeqCst);
        if asserted {
            self.attention.raise(reason::INTERRUPT);
        }
    }

    /// Whether INTR is asserted.
    pub fn intr(&self) -> bool {
        self.intr.load(Ordering::SeqCst)
    }

    /// Takes the note that an interrupt with a vector below 16 was received.
    pub fn take_bad_vector(&self) -> bool {
        self.bad_vector.swap(false, Ordering::SeqCst)
    }

    /// Delivers a non-maskable interrupt. They are counted, as far as a processor can hold them: of two that come at
    /// once the first is taken, which leaves room for the other.
    pub fn nmi(&self) {
        let more = |count: u8| (count < NMIS_MAX).then_some(count + 1);
        let _ = self.nmis.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        self.attention.raise(reason::NMI);
    }

    /// Takes the non-maskable interrupts that came.
    pub fn take_nmis(&self) -> u8 {
        self.nmis.swap(0, Ordering::SeqCst)
    }

    /// Delivers a start-up IPI.
    pub fn start_up(&self, vector: u8) {
        self.sipi.store(vector, Ordering::SeqCst);
        self.attention.raise(reason::SIPI);
    }

    /// The vector of the last start-up IPI.
    pub fn sipi_vector(&self) -> u8 {
        self.sipi.load(Ordering::SeqCst)
    }

    /// Mode of the APIC.
    pub fn mode(&self) -> ApicMode {
        match self.mode.load(Ordering::SeqCst) {
            0 => ApicMode::Disabled,
            1 => ApicMode::XApic,
            _ => ApicMode::X2Apic,
        }
    }

    /// Publishes the mode.
    pub fn set_mode(&self, mode: ApicMode) {
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// Publishes SVR bit 8.
    pub fn set_software_enabled(&self, on: bool) {
        self.software_enabled.store(on, Ordering::SeqCst);
    }

    /// Publishes LDR (whole register) and whether DFR asks for the flat model.
    pub fn set_logical(&self, ldr: u32, flat: bool) {
        self.logical_id.store(ldr, Ordering::SeqCst);
        self.flat.store(flat, Ordering::SeqCst);
    }

    /// Does it take part in lowest-priority arbitration?
    pub fn accepts_fixed(&self) -> bool {
        self.software_enabled.load(Ordering::SeqCst) && self.mode() != ApicMode::Disabled
    }

    /// Is `destination` this APIC? Broadcasts are the caller's business.
    pub fn matches(&self, destination: u32, logical: bool) -> bool {
        let mode = self.mode();
        if !logical {
            return mode != ApicMode::Disabled && destination == self.id;
        }
        let ldr = self.logical_id.load(Ordering::SeqCst);
        match mode {
            ApicMode::Disabled => false,
            ApicMode::X2Apic => destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0,
            ApicMode::XApic => {
                let ldr = ldr >> 24;
                if self.flat.load(Ordering::SeqCst) {
                    destination & ldr & 0xff != 0
                } else {
                    destination >> 4 & 0xf == ldr >> 4 && destination & ldr & 0xf != 0
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vector_sets_find_their_highest() {
        let set = VectorSet::default();
        assert_eq!(set.highest(), None);
        for vector in [16, 0x31, 0xef, 0x80] {
            assert!(set.insert(vector));
        }
        assert!(!set.insert(0xef));
        assert_eq!(set.highest(), Some(0xef));
        assert!(set.remove(0xef) && !set.remove(0xef));
        assert_eq!(set.highest(), Some(0x80));
        assert_eq!(set.word(1), 1 << 0x11);
    }

    #[test]
    fn logical_destinations() {
        let port = Port::new(5);
        port.set_logical(0b0010_0000 << 24, true);
        assert!(port.matches(0b0011_0000, true) && !port.matches(0b0001_0000, true));
        port.set_logical(0x21 << 24, false);
        assert!(port.matches(0x23, true) && !port.matches(0x13, true) && !port.matches(0x22, true));
        port.set_mode(ApicMode::X2Apic);
        port.set_logical(1 << 5, true);
        assert!(port.matches(0x0000_0020, true) && !port.matches(0x0001_0020, true));
        assert!(port.matches(5, false) && !port.matches(4, false));
    }

    #[test]
    fn a_disabled_apic_drops_fixed_interrupts() {
        let port = Port::new(0);
        port.post(0x40, false);
        assert!(!port.attention.any() && port.irr.highest().is_none());
        port.set_software_enabled(true);
        port.post(15, false);
        assert!(port.irr.highest().is_none() && port.take_bad_vector() && !port.take_bad_vector());
        port.attention.take();
        port.post(0x40, true);
        assert!(port.attention.any() && port.tmr.contains(0x40));
    }
}
