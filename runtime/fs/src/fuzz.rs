//! The fuzz target: a guest that sends whatever the input says. A crash, a panic, a hang, or a byte
//! outside of the share that has changed is a finding.

use std::fs;

use crate::protocol::ShareOptions;
use crate::rig::{ROOT, Rig, message, with_nul};

/// Lets `data` choose requests to a share with a few files in it.
///
/// # Panics
/// On a finding.
pub fn fuzz_fs(data: &[u8]) {
    let Ok(dir) = tempfile::tempdir() else { return };
    let shared = dir.path().join("shared");
    fs::create_dir_all(shared.join("d/e")).expect("a directory");
    fs::write(shared.join("f"), b"content").expect("a file");
    fs::write(dir.path().join("secret"), b"secret").expect("a file");
    std::os::unix::fs::symlink("../secret", shared.join("link")).expect("a link");
    let mut rig = Rig::new(&[("s", &shared, ShareOptions::default())], None);
    rig.init();
    let mut nodes = vec![0, 1, u64::MAX];
    if let Ok(share) = rig.lookup(ROOT, "s") {
        nodes.push(share);
        nodes.extend(["d", "f", "link"].iter().filter_map(|name| rig.lookup(share, name).ok()));
    }
    let names = ["..", ".", "", "d", "f", "link", "new", "../secret", "d/../../secret", "s"];
    for chunk in data.chunks(24).take(64) {
        let at = |i: usize| chunk.get(i).copied().unwrap_or(0);
        let opcode = u32::from(at(0) % 56);
        let node = nodes[usize::from(at(1)) % nodes.len()];
        let mut body: Vec<u8> = chunk.get(4..).unwrap_or_default().to_vec();
        body.resize(usize::from(at(2) % 9) * 8, 0);
        body.extend(with_nul(&[
            names[usize::from(at(3)) % names.len()],
            names[usize::from(at(3) / 16) % names.len()],
        ]));
        let room = [0, 8, 16, 200, 1 << 16][usize::from(at(2)) % 5];
        let mut request = message(opcode, node, &body);
        if at(1) & 0x80 != 0 {
            // A length that is not the message's.
            request[..4].copy_from_slice(&[at(4), at(5), at(6), at(7)]);
        }
        rig.send(&request, room);
    }
    drop(rig);
    assert_eq!(fs::read(dir.path().join("secret")).expect("it is there"), b"secret");
    assert_eq!(
        fs::read_dir(dir.path()).expect("a directory").count(),
        2,
        "nothing was made beside"
    );
}
