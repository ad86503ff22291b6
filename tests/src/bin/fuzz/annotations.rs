//! What images say of the unikernels in them: annotations, labels, `/urunc.json`, entry points.

use std::collections::BTreeMap;

use std::net::Ipv4Addr;

use mvm_sandbox::unikernel::{
    Addressed, Addresses, DiskSource, Error, Given, Kind, MountPoint, Packaging, Pairs, Recognised,
    Tree, UnikernelPlan, recognise,
};

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
        "bcom.urunc.unikernel.unikernelType=rumprun\n\
         bcom.urunc.unikernel.binary=/k\n\
         bcom.urunc.unikernel.block=/d.img\n\
         bcom.urunc.unikernel.blkMntPoint=/data\n\
         vA=b c\ncredis -v\nd\nd/more",
        "f/urunc.json={\"com.urunc.unikernel.unikernelType\":\"bGludXg=\",\
         \"com.urunc.unikernel.binary\":\"L2s=\",\"com.urunc.unikernel.mountRootfs\":\"dHJ1ZQ==\",\
         \"com.urunc.unikernel.blkMntPoint\":\"Lw==\"}\nvA=b c\nc/init\ncx y",
        "bcom.urunc.unikernel.unikernelType=mirage\n\
         bcom.urunc.unikernel.binary=/k\n\
         acom.urunc.unikernel.solo5NetDev=management\ncx",
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
    let disks: Vec<Option<MountPoint>> = list(b'd').iter().map(|at| at.parse().ok()).collect();
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
        disks: &disks,
        unikernel_platform: words.contains_key(&b'p'),
        tree: &files,
    });
    match recognised {
        Ok(Recognised::Linux(size)) => assert!(size.cpus != Some(0)),
        Ok(Recognised::Unikernel(plan)) => {
            let disk = match &plan.disk {
                Some(DiskSource::File(path)) => Some(path),
                Some(DiskSource::Root) | None => None,
            };
            let paths = [Some(&plan.kernel), plan.initrd.as_ref(), disk];
            for path in paths.into_iter().flatten() {
                let inside = path.starts_with('/') && path.split('/').all(|part| part != "..");
                assert!(inside && !path.contains(char::is_control), "{path:?}");
            }
            assert!(!plan.cmdline.contains(char::is_control), "{:?}", plan.cmdline);
            assert!(
                plan.left_out.iter().all(|what| !what.contains(char::is_control)),
                "{:?}",
                plan.left_out
            );
            connected(&plan);
        }
        Err(e) => assert!(!e.to_string().contains(char::is_control), "{e:?}"),
    }
}

/// A network changes nothing of what is there, and rumprun's document stays one, with the keys that it may have.
fn connected(plan: &UnikernelPlan) {
    let v4 = Given {
        ip: Ipv4Addr::new(10, 0, 0, 2),
        prefix: 24,
        gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
    };
    let addresses =
        Addresses { interfaces: vec![Addressed { v4: Some(v4), v6: None }; 2], name_server: None };
    let told = addresses.tell(&plan.dialect, &plan.cmdline).cmdline;
    assert!(!told.contains(char::is_control), "{told:?}");
    if plan.kind() != Kind::Rumprun {
        return;
    }
    let document: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&told).expect("a document");
    for (key, value) in &document {
        match key.as_str() {
            "cmdline" | "env" => assert!(value.is_string(), "{told}"),
            "net" => assert_eq!(value["addr"], "10.0.0.2", "{told}"),
            "blk" => {
                let at = value["mountpoint"].as_str().expect("a text");
                assert_eq!(
                    at.parse::<MountPoint>().expect("a mount point").to_string(),
                    at,
                    "{told}"
                );
            }
            _ => panic!("{key} in {told}"),
        }
    }
    assert!(document.contains_key("net") && document.contains_key("cmdline"), "{told}");
}
