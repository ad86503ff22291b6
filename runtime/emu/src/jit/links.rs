//! What links know of themselves: records among the code that is seldom run, for the dispatcher.

/// A direct jump inside a page that goes to its exit stub until it is linked (J6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Position of the distance to patch, from the start of the arena.
    pub site: u32,
    /// Which life of its page it belongs to.
    pub life: u32,
    /// Offset of the target in the page.
    pub target: u16,
    /// Flags are native at the jump: the target is its entry N.
    pub native: bool,
    /// The target goes without spans (J14).
    pub plain: bool,
    /// It goes forward, and without a look at the run word (J9).
    pub ahead: bool,
}

/// A jump that is linked to what is at an address, as long as a tag counts (J18, J20).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FarLink {
    /// Where its slot starts ([`JitEnv`](super::env::JitEnv)).
    pub slot: u32,
    pub goes: Goes,
}

/// Where such a jump goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goes {
    /// To the virtual address `target` in another page, if the block is where it was when it was made.
    To {
        target: u64,
        /// As in [`Link`].
        site: u32,
    },
    /// Wherever it will.
    Anywhere,
}

/// Bytes of a record of either kind.
pub const RECORD: usize = 16;

impl Link {
    pub fn to_bytes(self) -> [u8; RECORD] {
        let flags =
            u64::from(self.native) | u64::from(self.plain) << 1 | u64::from(self.ahead) << 2;
        pair(
            u64::from(self.site) | u64::from(self.life) << 32,
            u64::from(self.target) | flags << 16,
        )
    }

    pub fn of_bytes(bytes: [u8; RECORD]) -> Self {
        let [place, rest] = words(bytes);
        Self {
            site: place as u32,
            life: (place >> 32) as u32,
            target: rest as u16,
            native: rest >> 16 & 1 != 0,
            plain: rest >> 17 & 1 != 0,
            ahead: rest >> 18 & 1 != 0,
        }
    }
}

impl Goes {
    /// Words of its slot.
    pub fn words(self) -> u32 {
        match self {
            Self::To { .. } => 1,
            Self::Anywhere => 4,
        }
    }
}

impl FarLink {
    pub fn to_bytes(self) -> [u8; RECORD] {
        // No jump is where the stubs start.
        let (target, site) = match self.goes {
            Goes::To { target, site } => (target, site),
            Goes::Anywhere => (0, 0),
        };
        pair(target, u64::from(self.slot) | u64::from(site) << 32)
    }

    pub fn of_bytes(bytes: [u8; RECORD]) -> Self {
        let [target, rest] = words(bytes);
        let goes = match (rest >> 32) as u32 {
            0 => Goes::Anywhere,
            site => Goes::To { target, site },
        };
        Self { slot: rest as u32, goes }
    }
}

fn pair(low: u64, high: u64) -> [u8; RECORD] {
    (u128::from(low) | u128::from(high) << 64).to_le_bytes()
}

fn words(bytes: [u8; RECORD]) -> [u64; 2] {
    let both = u128::from_le_bytes(bytes);
    [both as u64, (both >> 64) as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_they_were() {
        for flags in 0..8u16 {
            let link = Link {
                site: 0xfedc_ba98,
                life: 0x8000_0001,
                target: 0xffe - flags,
                native: flags & 1 != 0,
                plain: flags & 2 != 0,
                ahead: flags & 4 != 0,
            };
            assert_eq!(Link::of_bytes(link.to_bytes()), link);
        }
        for goes in [Goes::Anywhere, Goes::To { target: u64::MAX - 5, site: 0xffff_fff0 }] {
            let link = FarLink { slot: 0x8765_4321, goes };
            assert_eq!(FarLink::of_bytes(link.to_bytes()), link);
        }
    }
}
