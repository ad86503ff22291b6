//! A Solo5 kernel's manifest: the devices that it demands, by name (Solo5's `mft_abi.h`).

use super::super::Error;
use super::super::elf::u32_at;

/// "MFT1".
const NOTE: u32 = 0x3154_464d;

const VERSION: u32 = 1;

/// Most entries, as Solo5 has it: a set of handles is a 64-bit number.
const MAX_ENTRIES: usize = 64;

/// The manifest begins at a multiple of 8 of the note's bytes, header included.
const PADDING: usize = 4;

/// Version and number of entries.
const HEADER: usize = 8;

/// An entry, and its fields.
const ENTRY: usize = 104;
const NAME_SIZE: usize = 68;
const KIND: usize = 68;
const PROPERTIES: usize = 72;
const BLOCK_SIZE: usize = 80;
/// After the address's six bytes.
const MTU: usize = PROPERTIES + 6;
const ATTACHED: usize = 96;

/// Kinds of entries. From [`RESERVED`] on they are Solo5's own and no devices.
const BLOCK: u32 = 1;
const NET: u32 = 2;
const RESERVED: u32 = 1 << 30;

/// What an entry demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A block device.
    Block,
    /// A network device.
    Net,
    /// Nothing.
    Reserved,
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What the kernel calls the device.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

/// The manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// In the order of their handles.
    pub entries: Vec<Entry>,
}

/// A device that an entry was given. Its handle is the entry's place in the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// A block device.
    Block {
        /// The entry's place.
        handle: u64,
        /// Bytes of the device.
        capacity: u64,
    },
    /// A network device.
    Net {
        /// The entry's place.
        handle: u64,
        /// The guest's address on it.
        mac: [u8; 6],
        /// Longest packet in bytes without the Ethernet header.
        mtu: u16,
    },
}

impl Attached {
    fn handle(&self) -> u64 {
        match *self {
            Self::Block { handle, .. } | Self::Net { handle, .. } => handle,
        }
    }

    /// Writes what the kernel is to know of it into its entry.
    fn show(&self, entry: &mut [u8; ENTRY]) {
        let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
        match *self {
            Self::Block { capacity, .. } => {
                put(PROPERTIES, &capacity.to_le_bytes());
                let sector = mvm_devices::virtio::block::SECTOR as u16;
                put(BLOCK_SIZE, &sector.to_le_bytes());
            }
            Self::Net { mac, mtu, .. } => {
                put(PROPERTIES, &mac);
                put(MTU, &mtu.to_le_bytes());
            }
        }
        put(ATTACHED, &[1]);
    }
}

impl Manifest {
    /// The type of its note.
    pub const NOTE: u32 = NOTE;

    /// Reads a manifest note's content.
    ///
    /// # Errors
    /// [`Error::Hvt`].
    pub fn parse(note: &[u8]) -> Result<Self, Error> {
        let damaged = |what: String| Error::Hvt(format!("its manifest is damaged: {what}"));
        let manifest = note.get(PADDING..).unwrap_or_default();
        let (version, count) = (u32_at(manifest, 0), u32_at(manifest, 4) as usize);
        if manifest.len() < HEADER || version != VERSION {
            let len = note.len();
            return Err(damaged(format!("it has {len} bytes and version {version}, not 1")));
        }
        if count > MAX_ENTRIES || manifest.len() != HEADER + count * ENTRY {
            let len = manifest.len();
            return Err(damaged(format!("{count} entries do not make up {len} bytes")));
        }
        let entries = manifest[HEADER..].chunks_exact(ENTRY).enumerate().map(|(handle, entry)| {
            let name = entry[..NAME_SIZE].split(|b| *b == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            let kind = match u32_at(entry, KIND) {
                BLOCK => Kind::Block,
                NET => Kind::Net,
                RESERVED.. => Kind::Reserved,
                other => {
                    return Err(Error::Hvt(format!(
                        "its manifest demands {name:?} (entry {handle}), a device of the unknown \
                         kind {other}"
                    )));
                }
            };
            Ok(Entry { name, kind })
        });
        Ok(Self { entries: entries.collect::<Result<_, _>>()? })
    }

    /// The manifest as the kernel is shown it, with the properties of what was attached.
    pub fn to_bytes(&self, attached: &[Attached]) -> Vec<u8> {
        let mut bytes = [VERSION, self.entries.len() as u32].map(u32::to_le_bytes).concat();
        for (handle, entry) in self.entries.iter().enumerate() {
            let mut raw = [0; ENTRY];
            let name = &entry.name.as_bytes()[..entry.name.len().min(NAME_SIZE - 1)];
            raw[..name.len()].copy_from_slice(name);
            let kind = match entry.kind {
                Kind::Block => BLOCK,
                Kind::Net => NET,
                Kind::Reserved => RESERVED,
            };
            raw[KIND..KIND + 4].copy_from_slice(&kind.to_le_bytes());
            if let Some(device) = attached.iter().find(|a| a.handle() == handle as u64) {
                device.show(&mut raw);
            }
            bytes.extend(raw);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::manifest_note as note;

    #[test]
    fn entries_are_numbered_and_named() {
        let manifest =
            Manifest::parse(&note(&[("", RESERVED), ("storage", 1), ("net0", 2)])).unwrap();
        let seen: Vec<_> = manifest.entries.iter().map(|e| (&*e.name, e.kind)).collect();
        assert_eq!(seen, [("", Kind::Reserved), ("storage", Kind::Block), ("net0", Kind::Net)]);
        assert_eq!(Manifest::parse(&note(&[])).unwrap().entries, []);
        let full = vec![("x", RESERVED); MAX_ENTRIES];
        assert_eq!(Manifest::parse(&note(&full)).unwrap().entries.len(), MAX_ENTRIES);
    }

    #[test]
    fn the_kernel_is_shown_what_was_attached() {
        let note = note(&[("", RESERVED), ("a", 1), ("b", 1), ("n", 2)]);
        let manifest = Manifest::parse(&note).unwrap();
        let mac = [2, 3, 4, 5, 6, 7];
        let shown = manifest.to_bytes(&[
            Attached::Net { handle: 3, mac, mtu: 1400 },
            Attached::Block { handle: 2, capacity: 0x1_0000_0200 },
        ]);
        assert_eq!(shown.len(), HEADER + 4 * ENTRY);
        let entry = |index: usize| &shown[HEADER + index * ENTRY..][..ENTRY];
        assert_eq!((entry(1)[0], entry(1)[ATTACHED]), (b'a', 0));
        assert_eq!((entry(2)[0], entry(2)[ATTACHED], u32_at(entry(2), KIND)), (b'b', 1, 1));
        assert_eq!(
            (u32_at(entry(2), 72), u32_at(entry(2), 76), u32_at(entry(2), 80)),
            (512, 1, 512)
        );
        let net = entry(3);
        assert_eq!((net[0], net[ATTACHED], u32_at(net, KIND)), (b'n', 1, 2));
        assert_eq!((&net[72..78], &net[78..80]), (&mac[..], &1400u16.to_le_bytes()[..]));
        let again = [&[0; PADDING][..], &shown].concat();
        assert_eq!(Manifest::parse(&again).unwrap(), manifest);
    }

    #[test]
    fn damaged_manifests_are_refused() {
        let good = note(&[("", RESERVED), ("storage", 1)]);
        for cut in 0..good.len() {
            assert!(Manifest::parse(&good[..cut]).is_err(), "{cut}");
        }
        let patched = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            Manifest::parse(&bytes)
        };
        assert!(patched(4, 2).is_err(), "version");
        for count in [0, 1, 3, 255] {
            assert!(patched(8, count).is_err(), "{count} entries");
        }
        let unknown = patched(12 + ENTRY + KIND, 3).unwrap_err().to_string();
        assert!(unknown.contains("\"storage\"") && unknown.contains("unknown kind 3"), "{unknown}");
        // A name without an end is cut, not read on.
        let mut bytes = good.clone();
        bytes[12 + ENTRY..][..NAME_SIZE].fill(b'n');
        let name = &Manifest::parse(&bytes).unwrap().entries[1].name;
        assert_eq!(name.len(), NAME_SIZE);
        assert!(Manifest::parse(&note(&[("x", RESERVED); MAX_ENTRIES + 1])).is_err());
    }
}
