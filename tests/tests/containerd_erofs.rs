//! containerd's EROFS snapshotter and differ, which came with version 2.1: layers are images that the snapshotter mounts,
//! and containers' roots are overlays of them. With Debian 12's own containerd these tests say that they are skipped;
//! `MVM_TEST_CONTAINERD=DIR` names a directory with newer programs (containerd, ctr, mkfs.erofs).

use std::time::Duration;

use mvm_tests::cri::Cri;
use mvm_tests::{Containerd, World, add_layers, run_with};

const IMAGE: &str = "docker.io/library/layers:latest";

/// Three layers above busybox's. Each has a file of its own, changes the last one's, and takes one away.
const LAYERS: &[&[(&str, &str)]] = &[
    &[("first", "1\n"), ("same", "of the first\n"), ("gone", "x")],
    &[("second", "2\n"), ("same", "of the second\n"), (".wh.gone", "")],
    &[("third", "3\n"), ("same", "of the third\n"), (".wh.second", "")],
];

fn import(ctd: &Containerd) {
    let archive = ctd.path("layers.tar");
    add_layers(&World::new().image_file("busybox"), LAYERS, &archive);
    // The daemon's own way of importing unpacks for one snapshotter that its configuration names.
    let file = archive.display().to_string();
    let flags =
        ["image", "import", "--local", "--snapshotter", "erofs", "--index-name", IMAGE, &file];
    ctd.ctr(&flags).expect_code(0);
}

#[test]
fn roots_of_several_layers_are_read_and_written() {
    let Some(ctd) = Containerd::with_erofs(false) else { return };
    import(&ctd);
    let run = |flags: &[&str], id: &str, script: &str| {
        let flags: Vec<&str> = ["--rm"].iter().chain(flags).copied().collect();
        let command = ctd.run_image_command(&flags, IMAGE, id, &["sh", "-c", script]);
        run_with(command, b"", Duration::from_secs(300))
    };
    let look = "cat /first /same /third; ls /gone /second 2>/dev/null || echo not there";
    let seen = "1\nof the third\n3\nnot there\n";
    for round in 0..2 {
        // What one container writes is in its own snapshot.
        let script =
            format!("{look}; echo mine >/same; rm /first; cat /same; ls /first 2>&1 | wc -l");
        let run = run(&[], &format!("c{round}"), &script).expect_code(0);
        assert_eq!(run.out(), format!("{seen}mine\n1\n"), "{}", run.err());
    }
    let run = run(&["--read-only"], "ro", &format!("{look}; echo x >/same || echo refused"));
    assert_eq!(run.expect_code(0).out(), format!("{seen}refused\n"));
    ctd.expect_nothing_left();
}

#[test]
fn containers_of_a_pod_have_such_roots() {
    let Some(ctd) = Containerd::with_erofs(true) else { return };
    import(&ctd);
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("erofs"));
    let script = "cat /first /same; echo mine >>/same; cat /same; [ -e /second ] || echo not there";
    for round in 0..2 {
        let name = format!("c{round}");
        let mut config = cri.container_config(&name, script);
        config.image.mut_or_insert_default().image = IMAGE.into();
        let id = cri.start(&pod, config);
        assert_eq!(cri.wait(&id), 0);
        let same = "of the third\n";
        assert_eq!(cri.log(&pod, &name), format!("1\n{same}{same}mine\nnot there\n"));
        cri.remove(&id);
    }
    cri.remove_pod(&pod);
    ctd.expect_nothing_left();
}
