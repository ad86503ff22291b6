//! What images say of the unikernels in them: annotations, labels, `/urunc.json`, entry points.

use std::collections::BTreeMap;

use mvm_sandbox::unikernel::{Error, Packaging, Pairs, Recognised, Tree, recognise};

/// Images as lines: a letter for the place, then a word or `KEY=VALUE`.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "bcom.urunc.unikernel.unikernelType=unikraft\n\
         bcom.urunc.unikernel.hypervisor=qemu\n\
         bcom.urunc.unikernel.binary=/unikernel/app\n\
         bcom.urunc.unikernel.cmdline=nginx -c \"/etc/x y\"\n\
         bcom.urunc.unikernel.initrd=L2k=\n\
         acom.urunc.unikernel.unikernelVersion=0.15.0\n\
         vPATH=/bin\nvA=b c\nxuser",
        "f/urunc.json={\"com.urunc.unikernel.unikernelType\":\"bWlyYWdl\",\
         \"com.urunc.unikernel.binary\":\"L2E=\",\"com.urunc.unikernel.block\":\"L2I=\",\
         \"com.urunc.unikernel.useDMBlock\":\"ZmFsc2U=\"}\n",
        "p\nlorg.unikraft.kernel.image=/k\nlorg.unikraft.kernel.initrd=/i\nc/app\nvA=b",
        "e/x/app\ncword\nf/x/app=\x7fELF\x02\x01\x01\u{ff}\nf/x/hermit-loader=x",
        "mkrun.cpus=2\nmkrun.ram_mib=256\ne/bin/sh",
    ]
    // The file's bytes are Latin-1, so that an ELF header can be among them.
    .map(|text| text.chars().map(|c| c as u8).collect())
    .to_vec()
}

#[derive(Debug, Default)]
struct Files(BTreeMap<String, Vec<u8>>);

impl Tree for Files {
    fn head(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.0.get(path).map(|bytes| bytes[..limit.min(bytes.len())].to_vec()))
    }
}

/// Whatever an image says, it stays within itself, and on one line.
pub fn run(bytes: &[u8]) {
    let mut pairs: BTreeMap<u8, Pairs> = BTreeMap::new();
    let mut words: BTreeMap<u8, Vec<String>> = BTreeMap::new();
    let mut files = Files::default();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some((place, rest)) = line.split_first() else { continue };
        let at = rest.iter().position(|byte| *byte == b'=').unwrap_or(rest.len());
        let value = rest.get(at + 1..).unwrap_or_default();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match place {
            b'a' | b'm' | b'l' | b'b' => {
                pairs.entry(*place).or_default().insert(text(&rest[..at]), text(value));
            }
            b'f' => drop(files.0.insert(text(&rest[..at]), value.to_vec())),
            _ => words.entry(*place).or_default().push(text(rest)),
        }
    }
    let (none, empty) = (Pairs::new(), Vec::new());
    let pairs = |place: u8| pairs.get(&place).unwrap_or(&none);
    let list = |place: u8| words.get(&place).unwrap_or(&empty).as_slice();
    let recognised = recognise(&Packaging {
        annotations: pairs(b'a'),
        manifest: pairs(b'm'),
        layers: &[pairs(b'l')],
        labels: pairs(b'b'),
        env: list(b'v'),
        entrypoint: list(b'e'),
        cmd: list(b'c'),
        args: list(b'x'),
        kernel_args: "",
        unikernel_platform: words.contains_key(&b'p'),
        tree: &files,
    });
    match recognised {
        Ok(Recognised::Linux(size)) => assert!(size.cpus != Some(0)),
        Ok(Recognised::Unikernel(plan)) => {
            let paths = [Some(&plan.kernel), plan.initrd.as_ref(), plan.disk.as_ref()];
            for path in paths.into_iter().flatten() {
                let inside = path.starts_with('/') && path.split('/').all(|part| part != "..");
                assert!(inside && !path.contains(char::is_control), "{path:?}");
            }
            assert!(!plan.cmdline.contains(char::is_control), "{:?}", plan.cmdline);
        }
        Err(e) => assert!(!e.to_string().contains(char::is_control), "{e:?}"),
    }
}
