//! A reader of as much AML as the tables have (ACPI 6.5, 20.2): scopes, devices, names and data.
//! It knows nothing of how they were written.

use std::collections::BTreeMap;

/// The value of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Integer(u64),
    Text(String),
    Buffer(Vec<u8>),
    Package(Vec<Value>),
}

/// Everything that was named, by its path (`\_SB_.COM1._HID`).
pub type Names = BTreeMap<String, Value>;

/// A device's resource (6.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    Io { base: u16, len: u8 },
    Memory { base: u32, len: u32, writable: bool },
    Interrupt { gsi: u32, edge: bool, active_low: bool, shared: bool },
}

/// Reads the body of a DSDT.
pub fn names(aml: &[u8]) -> Names {
    let mut names = Names::new();
    let mut reader = Reader(aml);
    reader.terms("", &mut names);
    names
}

/// Reads the buffer of a `_CRS`.
pub fn resources(value: &Value) -> Vec<Resource> {
    let Value::Buffer(bytes) = value else { panic!("no resource template: {value:?}") };
    let mut reader = Reader(bytes);
    let mut found = Vec::new();
    loop {
        match reader.byte() {
            0x47 => {
                let [_decode, min0, min1, max0, max1, _align, len] = reader.array();
                assert_eq!([min0, min1], [max0, max1]);
                found.push(Resource::Io { base: u16::from_le_bytes([min0, min1]), len });
            }
            0x86 => {
                assert_eq!(reader.array(), 9u16.to_le_bytes());
                let writable = reader.byte() == 1;
                let [base, len] = [(); 2].map(|()| u32::from_le_bytes(reader.array()));
                found.push(Resource::Memory { base, len, writable });
            }
            0x89 => {
                assert_eq!(reader.array(), 6u16.to_le_bytes());
                let [flags, count] = reader.array();
                assert_eq!((flags & 1, count), (1, 1), "one interrupt, of a consumer");
                let gsi = u32::from_le_bytes(reader.array());
                let [edge, active_low, shared] = [1, 2, 3].map(|bit| flags >> bit & 1 != 0);
                found.push(Resource::Interrupt { gsi, edge, active_low, shared });
            }
            0x79 => {
                assert_eq!(reader.array(), [0], "no checksum");
                assert!(reader.0.is_empty(), "bytes after the end tag");
                return found;
            }
            tag => panic!("unknown resource {tag:#x}"),
        }
    }
}

/// The text of a packed EISA id (19.3.4): three letters in five bits each, four hexadecimal digits.
pub fn eisa_id(value: &Value) -> String {
    let Value::Integer(id) = value else { panic!("no EISA id: {value:?}") };
    let id = (*id as u32).swap_bytes();
    let letters = [26, 21, 16].map(|shift| char::from((id >> shift & 0x1f) as u8 + b'@'));
    format!("{}{:04X}", letters.iter().collect::<String>(), id & 0xffff)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(len);
        self.0 = tail;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).try_into().unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// The rest of a package whose length field comes next.
    fn package(&mut self) -> Reader<'a> {
        let whole = self.0;
        let lead = self.byte();
        let more = usize::from(lead >> 6);
        let mut len = usize::from(if more == 0 { lead & 0x3f } else { lead & 0xf });
        for (index, byte) in self.take(more).iter().enumerate() {
            len |= usize::from(*byte) << (4 + 8 * index);
        }
        self.0 = &whole[len..];
        Reader(&whole[1 + more..len])
    }

    /// A name in `scope`, with its path.
    fn path(&mut self, scope: &str) -> String {
        let root = self.0[0] == b'\\';
        if root {
            self.byte();
        }
        let segments = match self.0[0] {
            0x2e => {
                self.byte();
                2
            }
            first => {
                assert!(first == b'_' || first.is_ascii_uppercase(), "{first:#x} begins no name");
                1
            }
        };
        let mut path = if root { "\\".into() } else { format!("{scope}.") };
        for index in 0..segments {
            let name = self.take(4);
            assert!(
                name.iter().all(|c| *c == b'_' || c.is_ascii_uppercase() || c.is_ascii_digit())
            );
            path += if index > 0 { "." } else { "" };
            path += std::str::from_utf8(name).unwrap();
        }
        path
    }

    fn terms(&mut self, scope: &str, names: &mut Names) {
        while !self.0.is_empty() {
            match self.byte() {
                0x08 => {
                    let path = self.path(scope);
                    let value = self.value();
                    assert!(names.insert(path.clone(), value).is_none(), "{path} twice");
                }
                0x10 => self.block(scope, names),
                0x5b => {
                    assert_eq!(self.byte(), 0x82, "only devices are expected here");
                    self.block(scope, names);
                }
                op => panic!("unknown term {op:#x}"),
            }
        }
    }

    fn block(&mut self, scope: &str, names: &mut Names) {
        let mut body = self.package();
        let path = body.path(scope);
        body.terms(&path, names);
    }

    fn value(&mut self) -> Value {
        match self.byte() {
            0x00 => Value::Integer(0),
            0x01 => Value::Integer(1),
            0x0a => Value::Integer(self.byte().into()),
            0x0b => Value::Integer(u16::from_le_bytes(self.array()).into()),
            0x0c => Value::Integer(u32::from_le_bytes(self.array()).into()),
            0x0d => {
                let len = self.0.iter().position(|b| *b == 0).unwrap();
                let text = String::from_utf8(self.take(len).to_vec()).unwrap();
                self.byte();
                Value::Text(text)
            }
            0x11 => {
                let mut body = self.package();
                let Value::Integer(len) = body.value() else { panic!("a buffer without size") };
                assert_eq!(len, body.0.len() as u64);
                Value::Buffer(body.0.to_vec())
            }
            0x12 => {
                let mut body = self.package();
                let count = body.byte();
                let values = (0..count).map(|_| body.value()).collect();
                assert!(body.0.is_empty());
                Value::Package(values)
            }
            op => panic!("unknown value {op:#x}"),
        }
    }
}
