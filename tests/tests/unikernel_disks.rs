//! Disks of unikernels: from images and from the user, and what the guest is told of them.

use std::fs;

use mvm_tests::recipe::{Recipe, image};
use mvm_tests::unikernel::{engines, kernel};
use mvm_tests::{Chroot, Finished, World, engine};
use mvm_vmm::layout;
use serde_json::{Value, json};

/// Eight sectors that begin with a text.
fn disk(text: &str) -> Vec<u8> {
    let mut bytes = vec![0; 8 * 512];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// urunc's labels for our unikernel.
fn labels(more: &[(&str, &str)]) -> Value {
    let fixed = [("unikernelType", "rust"), ("binary", "/unikernel/app")];
    let all = fixed
        .iter()
        .chain(more)
        .map(|(key, value)| (format!("com.urunc.unikernel.{key}"), Value::from(*value)));
    Value::Object(all.collect())
}

fn run(world: &World, engine: &str, args: &[&str]) -> Finished {
    world.mvm(&[&["run", "--engine", engine, "--rm"], args].concat())
}

#[track_caller]
fn expect(out: &str, lines: &[&str]) {
    for line in lines {
        assert!(out.lines().any(|l| l == *line), "no line {line:?} in:\n{out}");
    }
}

#[test]
fn a_disk_of_the_images_is_there_and_its_mount_point_is_told() {
    let world = World::new();
    let (kernel, disk) = (fs::read(kernel()).unwrap(), disk("A disk in an image."));
    let block = [("block", "/unikernel/disk.img"), ("blkMntPoint", "/data//x/")];
    let files: [(&str, &[u8]); 2] = [("/unikernel/app", &kernel), ("/unikernel/disk.img", &disk)];
    let config = json!({"Labels": labels(&block), "Cmd": ["hello", "disk"]});
    let by_labels = image(&world, "labels", &Recipe { config, files: &files, ..Recipe::default() });
    // "rust", "/unikernel/app", "/unikernel/disk.img", "/data/x" in base64, as the tools write this file.
    let json = json!({
        "com.urunc.unikernel.unikernelType": "cnVzdA==",
        "com.urunc.unikernel.binary": "L3VuaWtlcm5lbC9hcHA=",
        "com.urunc.unikernel.block": "L3VuaWtlcm5lbC9kaXNrLmltZw==",
        "com.urunc.unikernel.blkMntPoint": "L2RhdGEveA==",
        "com.urunc.unikernel.cmdline": "aGVsbG8gZGlzaw==",
    })
    .to_string();
    let files = [files[0], files[1], ("/urunc.json", json.as_bytes())];
    let by_file = image(&world, "file", &Recipe { files: &files, ..Recipe::default() });
    for engine in engines() {
        // What a guest writes is gone with it: the second finds what the first did.
        for image in [&by_labels, &by_labels, &by_file] {
            let done = run(&world, engine, &[image]).expect_code(0);
            let told = done
                .out()
                .lines()
                .find(|line| line.starts_with("booted by "))
                .unwrap_or_default()
                .to_owned();
            assert!(told.contains(": disk0.mount=/data/x hello disk"), "{engine}: {told}");
            expect(
                &done.out(),
                &["disk 0: 8 sectors, \"A disk in an image.\"", "disk 0: to be mounted at /data/x"],
            );
            assert_eq!(done.err().matches("not told").count(), 0, "{}", done.err());
        }
    }
}

#[test]
fn all_that_is_in_an_image_can_be_the_disk() {
    let world = World::new();
    let kernel = fs::read(kernel()).unwrap();
    let files: [(&str, &[u8]); 2] =
        [("/unikernel/app", &kernel), ("/etc/motd", b"The-motd-of-an-image.")];
    let config = json!({
        "Labels": labels(&[("mountRootfs", "true")]),
        "Cmd": ["hello", "disk", "find=The-motd"],
    });
    let image = image(&world, "whole", &Recipe { config, files: &files, ..Recipe::default() });
    for engine in engines() {
        let out = run(&world, engine, &[&image]).expect_code(0).out();
        assert!(out.contains(": disk0.mount=/ hello disk"), "{engine}: {out}");
        expect(&out, &["disk 0: 262144 sectors, \"\"", "disk 0: to be mounted at /"]);
        assert_eq!(
            out.matches("disk 0: \"The-motd\" is at the beginning of sector ").count(),
            1,
            "{engine}: {out}"
        );
    }
}

/// An image as urunc's for Linux are: a kernel, and a program that is its init. The kernel is that of our own guests, which has
/// no ACPI and is told where devices are by the user.
#[test]
fn linux_has_all_that_is_in_its_image_for_its_root() {
    let world = World::new();
    let busybox = Chroot::new(&world.image_file("busybox"));
    let busybox = fs::read(busybox.path().join("bin/busybox")).unwrap();
    let linux = fs::read(world.images().join("vmlinux")).unwrap();
    let files: [(&str, &[u8]); 4] = [
        ("/boot/vmlinux", &linux),
        ("/bin/busybox", &busybox),
        ("/etc/motd", b"The motd of an image.\n"),
        ("/dev/empty", b""),
    ];
    let script = "busybox cat /etc/motd; echo $GREETING; echo written > /new; busybox sync; busybox cat /new; \
                  busybox reboot -f";
    let config = json!({
        "Labels": labels(&[("unikernelType", "linux"), ("binary", "/boot/vmlinux"), ("mountRootfs", "true")]),
        "Env": ["GREETING=hello there"],
        "Entrypoint": ["/bin/busybox"],
        "Cmd": ["sh", "-c", script],
    });
    let image = image(&world, "linux", &Recipe { config, files: &files, ..Recipe::default() });
    let devices = (0..4_u32).map(|n| {
        let at = layout::VIRTIO_MMIO + u64::from(n) * layout::VIRTIO_MMIO_SIZE;
        format!("virtio_mmio.device={}@{at:#x}:{}", layout::VIRTIO_MMIO_SIZE, layout::virtio_gsi(n))
    });
    let words = ["quiet".to_owned()].into_iter().chain(devices).collect::<Vec<_>>().join(" ");
    let out = run(&world, engine(), &["--cmdline", &words, &image])
        .expect_code(0)
        .out()
        .replace('\r', "");
    expect(&out, &["The motd of an image.", "hello there", "written"]);
}

#[test]
fn the_users_disks_come_behind_and_are_written_to() {
    let world = World::new();
    let (kernel, own) = (fs::read(kernel()).unwrap(), disk("Of the image."));
    let files: [(&str, &[u8]); 2] = [("/unikernel/app", &kernel), ("/own.img", &own)];
    let config = json!({"Labels": labels(&[("block", "/own.img")]), "Cmd": ["hello", "disk"]});
    let image = image(&world, "two", &Recipe { config, files: &files, ..Recipe::default() });
    let path = |name: &str| world.root().join(name).to_str().unwrap().to_owned();
    for engine in engines() {
        let [a, b] = ["a.img", "b.img"].map(path);
        fs::write(&a, disk("Of the user.")).unwrap();
        fs::write(&b, disk("Only read.")).unwrap();
        let flags = ["--disk", &format!("{a}:/data"), "--disk", &format!("{b}:ro"), &image];
        let out = run(&world, engine, &flags).expect_code(0).out();
        assert!(out.contains(": disk1.mount=/data hello disk"), "{engine}: {out}");
        expect(
            &out,
            &[
                "disk 0: 8 sectors, \"Of the image.\"",
                "disk 1: 8 sectors, \"Of the user.\"",
                "disk 1: to be mounted at /data",
                "disk 2: 8 sectors, \"Only read.\"",
            ],
        );
        assert!(fs::read(&a).unwrap()[512..].starts_with(b"The unikernel was here."));
        assert_eq!(fs::read(&b).unwrap(), disk("Only read."));
        // The same without an image.
        let bare =
            ["--unikernel", "rust", "--kernel", mvm_tests::unikernel::kernel().to_str().unwrap()]
                .map(str::to_owned);
        let bare: Vec<&str> =
            bare.iter().map(String::as_str).chain(["--disk", flags[1], "hello", "disk"]).collect();
        let out = run(&world, engine, &bare).expect_code(0).out();
        assert!(out.contains(": disk0.mount=/data hello disk"), "{engine}: {out}");
        expect(&out, &["disk 0: 8 sectors, \"Of the user.\""]);
    }
}

#[test]
fn what_cannot_be_told_is_said_and_what_makes_no_sense_is_refused() {
    let world = World::new();
    let kernel = fs::read(kernel()).unwrap();
    let files: [(&str, &[u8]); 2] = [("/unikernel/app", &kernel), ("/d", &disk("x"))];
    let with = |name: &str, more: &[(&str, &str)]| {
        let config = json!({"Labels": labels(more), "Cmd": ["hello"]});
        image(&world, name, &Recipe { config, files: &files, ..Recipe::default() })
    };
    let refused = |args: &[&str], words: &[&str]| {
        let done = run(&world, engine(), args).expect_code(125);
        assert_eq!((done.err().lines().count(), done.out().len()), (1, 0), "{}", done.err());
        words
            .iter()
            .for_each(|word| assert!(done.err().contains(word), "no {word:?} in {}", done.err()));
    };
    for (number, at) in
        ["/a b", "/../etc", "data", "/a\"}", "/a\u{1b}[2J", "/a,b"].into_iter().enumerate()
    {
        let image = with(&format!("at{number}"), &[("block", "/d"), ("blkMntPoint", at)]);
        refused(&[&image], &["com.urunc.unikernel.blkMntPoint"]);
    }
    let missing = with("missing", &[("block", "/no-such"), ("blkMntPoint", "/")]);
    refused(&[&missing], &["/no-such", "does not exist"]);
    let odd = with("odd", &[("mountRootfs", "perhaps")]);
    refused(&[&odd], &["com.urunc.unikernel.mountRootfs", "perhaps"]);
    let solo5 = with("solo5", &[("unikernelType", "mirage"), ("mountRootfs", "1")]);
    refused(&[&solo5], &["com.urunc.unikernel.mountRootfs", "mount no disk"]);
    let plain = with("plain", &[]);
    let disk = world.root().join("disk").to_str().unwrap().to_owned();
    fs::write(&disk, [0; 512]).unwrap();
    refused(&["--disk", &format!("{disk}:/a b"), &plain], &["--disk", "mount point"]);
    let kernel = mvm_tests::unikernel::kernel();
    let bare = ["--unikernel", "nanos", "--kernel", kernel.to_str().unwrap(), "--disk"];
    refused(&[&bare[..], &[&format!("{disk}:/data")]].concat(), &["mounts.LABEL"]);

    // Told in an image, it is no reason not to run.
    let untold =
        with("untold", &[("unikernelType", "hermit"), ("block", "/d"), ("blkMntPoint", "/data")]);
    let done = run(&world, engine(), &[&untold]).expect_code(0);
    assert!(
        done.err().contains("not told that its disk is to be mounted at /data"),
        "{}",
        done.err()
    );
}
