//! Wrong input: one clear line, the right exit code, nothing left.

use std::fs;
use std::process::Command;
use std::time::Duration;

use mvm_tests::{Finished, World, run_with};

/// Fails with `code`, and tells every word of `words` on standard error, without a backtrace.
#[track_caller]
fn fails(world: &World, args: &[&str], code: i32, words: &[&str]) {
    let run = world.mvm(args).expect_code(code);
    for word in words {
        assert!(run.err().contains(word), "no {word:?} in: {}", run.err());
    }
    assert!(!run.err().contains("panicked"), "{}", run.err());
    let own =
        run.err().lines().filter(|line| !line.ends_with("(slower; see `mvm doctor`)")).count();
    assert_eq!(own, 1, "not one clear line: {}", run.err());
}

#[track_caller]
fn leaves_nothing(world: &World) {
    assert_eq!(world.mvm(&["ps", "-aq"]).expect_code(0).out(), "");
}

#[test]
fn an_image_that_is_not_there() {
    let world = World::new();
    fails(
        &world,
        &["run", "nothing:here"],
        125,
        &["nothing:here", "skopeo copy", "mvm image import"],
    );
    leaves_nothing(&world);
}

#[test]
fn flags_that_make_no_sense() {
    let world = World::new();
    fails(&world, &["run", "--no-such-flag", "busybox"], 125, &["--no-such-flag"]);
    fails(&world, &["run", "--cpus", "-1", "busybox"], 125, &["--cpus"]);
    fails(&world, &["run", "--memory", "lots", "busybox"], 125, &["--memory"]);
    fails(&world, &["run", "--engine", "tcg", "busybox"], 125, &["engine"]);
    fails(&world, &["run", "-e", "=x", "busybox"], 125, &["=x"]);
}

#[test]
fn too_little_memory() {
    let world = World::small();
    fails(
        world,
        &["run", "--rm", "--memory", "8m", "busybox", "true"],
        125,
        &["--memory 8m", "64"],
    );
    fails(world, &["run", "--rm", "--memory", "2t", "busybox", "true"], 125, &["--memory 2t"]);
    leaves_nothing(world);
    world.mvm(&["run", "--rm", "--memory", "64m", "busybox", "true"]).expect_code(0);
}

#[test]
fn a_kernel_that_is_none() {
    let world = World::small();
    let file = world.root().join("not-a-kernel");
    fs::write(&file, b"#!/bin/sh\necho I am a script\n").unwrap();
    fails(
        world,
        &["run", "--rm", "--kernel", file.to_str().unwrap(), "busybox", "true"],
        125,
        &["not a kernel"],
    );
    fails(world, &["run", "--rm", "--kernel", "/no/such", "busybox", "true"], 125, &["/no/such"]);
    fails(world, &["run", "--rm", "--kernel", "/", "busybox", "true"], 125, &["not a file"]);
    leaves_nothing(world);
}

#[test]
fn archives_that_are_broken() {
    let world = World::new();
    let good = fs::read(world.image_file("busybox")).unwrap();
    let file = world.root().join("image.tar");
    let path = file.to_str().unwrap();
    fs::write(&file, &good[..good.len() / 2]).unwrap();
    fails(&world, &["image", "import", path], 125, &["image.tar"]);
    fs::write(&file, b"this is no archive at all, only a line of text").unwrap();
    fails(&world, &["image", "import", path], 125, &["image.tar"]);
    let mut wrong = good;
    let middle = wrong.len() / 2;
    wrong[middle] ^= 0xff;
    fs::write(&file, &wrong).unwrap();
    fails(&world, &["image", "import", path], 125, &["digest"]);
    assert_eq!(world.mvm(&["image", "ls", "-q"]).expect_code(0).out(), "");
}

#[test]
fn an_image_for_another_architecture() {
    let world = World::new();
    let dir = world.root().join("arm");
    let script = r#"mkdir "$2" && tar -C "$2" -xf "$1" && cd "$2" &&
        m=$(sed -E 's/.*sha256:([0-9a-f]+)".*/\1/' index.json) && c=$(sed -E 's/.*"config":\{[^}]*sha256:([0-9a-f]+)".*/\1/' blobs/sha256/$m) &&
        sed 's/"amd64"/"arm64"/' blobs/sha256/$c > c && n=$(sha256sum < c | cut -c1-64) && mv c blobs/sha256/$n &&
        sed "s/$c/$n/" blobs/sha256/$m > m && k=$(sha256sum < m | cut -c1-64) && mv m blobs/sha256/$k && sed -i "s/$m/$k/" index.json"#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(world.image_file("busybox")).arg(&dir);
    run_with(command, b"", Duration::from_secs(60)).expect_code(0);
    fails(&world, &["run", dir.to_str().unwrap(), "true"], 125, &["arm64", "amd64"]);
    leaves_nothing(&world);
}

#[test]
fn a_terminal_that_is_none() {
    let world = World::small();
    fails(world, &["run", "--rm", "-t", "busybox", "true"], 125, &["TTY"]);
    fails(world, &["run", "--rm", "-it", "busybox", "true"], 125, &["TTY"]);
    leaves_nothing(world);
}

/// Runs a shell script in which `$0` is mvm and `$1` the root directory.
#[track_caller]
fn script(world: &World, script: &str) -> Finished {
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(world.binary()).arg(world.root());
    run_with(command, b"", Duration::from_secs(120))
}

#[test]
fn a_closed_output_ends_the_run() {
    let world = World::small();
    let run = script(
        world,
        "{ \"$0\" --root \"$1\" run --rm --engine emu busybox yes; echo $? >&2; } | head -n 1",
    );
    assert_eq!(run.out(), "y\n");
    assert_eq!(
        run.err(),
        "mvm: standard output was closed by its reader; the container was ended\n141\n"
    );
    leaves_nothing(world);
}

#[test]
fn standard_streams_that_were_never_open() {
    let world = World::small();
    let line =
        "\"$0\" --root \"$1\" run --rm -i --engine emu busybox sh -c 'echo out; echo err >&2'";
    let run = script(world, &format!("{line} <&-; echo $?"));
    assert_eq!((run.out(), run.err()), ("out\nerr\n0\n".replace("err\n", ""), "err\n".into()));
    // What nobody can read is written to /dev/null, as for any other program.
    script(world, &format!("{line} >&-")).expect_code(0);
    script(world, &format!("{line} 2>&-")).expect_code(0);
    script(world, &format!("{line} <&- >&- 2>&-")).expect_code(0);
    script(world, "\"$0\" --root \"$1\" ps >&-").expect_code(0);
    leaves_nothing(world);
}

#[test]
fn a_full_device_behind_standard_output() {
    let world = World::small();
    let run = script(world, "\"$0\" --root \"$1\" run --rm --engine emu busybox yes >/dev/full")
        .expect_code(125);
    assert!(run.err().contains("No space left on device"), "{}", run.err());
    assert_eq!(run.err().lines().count(), 1, "{}", run.err());
    leaves_nothing(world);
}

#[test]
fn containers_that_are_not_there_and_names_that_are_none() {
    let world = World::small();
    for verb in ["stop", "kill", "rm", "wait", "inspect", "logs", "pause", "unpause", "stats"] {
        fails(world, &[verb, "nobody"], 125, &["no such container: nobody"]);
    }
    fails(world, &["exec", "nobody", "true"], 125, &["no such container: nobody"]);
    for name in ["a", "../x", "a b", "-x=", "ä"] {
        let name = format!("--name={name}");
        fails(world, &["run", &name, "busybox", "true"], 125, &["invalid container name"]);
    }
    fails(world, &["image", "rm", "nobody"], 125, &["nobody"]);
    fails(world, &["image", "inspect", "No/Such:Image:At:All"], 125, &["No/Such"]);
    leaves_nothing(world);
}

#[test]
fn values_that_no_flag_can_have() {
    let world = World::small();
    for (flag, word) in [
        ("--cpus=0", "0"),
        ("--cpus=many", "many"),
        ("--memory=-1", "-1"),
        ("--ulimit=nofile=2:1", "nofile"),
        ("--ulimit=bogus=1", "bogus"),
        ("--tmpfs=relative", "relative"),
        ("--tmpfs=/x:size=lots", "lots"),
        ("--cap-add=BOGUS", "BOGUS"),
        ("--security-opt=bogus", "bogus"),
        ("--stop-signal=BOGUS", "BOGUS"),
        ("--hostname=a b", "a b"),
        ("--env-file=/no/such", "/no/such"),
        ("--workdir=relative", "relative"),
        ("--user=no-such-user", "no-such-user"),
        ("--label==x", "=x"),
        ("--console=/no/such/dir/file", "/no/such/dir/file"),
        ("--initrd=/no/such", "/no/such"),
        ("--timings=xml", "xml"),
        ("--boot-timeout=x", "x"),
    ] {
        fails(world, &["run", "--rm", flag, "busybox", "true"], 125, &[word]);
    }
    leaves_nothing(world);
}

#[test]
fn a_guest_that_does_not_come_up() {
    let world = World::small();
    let run = world
        .mvm(&["run", "--rm", "--cmdline", "rdinit=/no/such/init", "busybox", "true"])
        .expect_code(125);
    assert!(run.err().contains("Kernel panic"), "{}", run.err());
    assert!(run.err().starts_with("mvm: the machine could not be started: "), "{}", run.err());
    leaves_nothing(world);
}

/// A file system of its own of `size`, mounted in a mount namespace in which `then` runs; `$0` is
/// mvm, `$1` the mount point and `$2` the busybox archive.
#[track_caller]
fn on_small_disk(size: &str, then: &str) -> Finished {
    let world = World::new();
    let dir = world.root().join("disk");
    fs::create_dir(&dir).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg(format!("mount -t tmpfs -o size={size} tmpfs \"$1\" && {then}"));
    command.arg(world.binary()).arg(&dir).arg(world.image_file("busybox"));
    run_with(command, b"", Duration::from_secs(120))
}

#[test]
fn a_disk_that_becomes_full_while_importing() {
    // Room for the layer, not for the tree that is made of it.
    let run = on_small_disk(
        "1600k",
        "{ \"$0\" --root \"$1\" image import \"$2\"; echo code $?; \"$0\" --root \"$1\" image ls -q; \
         find \"$1\" -type f -size +4k; }",
    )
    .expect_code(0);
    assert_eq!(run.out(), "code 125\n", "something is left");
    assert!(run.err().contains("no space left"), "{}", run.err());
    assert_eq!(run.err().lines().count(), 1, "{}", run.err());
}

#[test]
fn a_container_on_a_disk_that_became_full_can_be_removed() {
    // Not even its end can be written down.
    let run = on_small_disk(
        "8m",
        "mvm=\"$0\"; root=\"$1\"; archive=\"$2\"; mvm() { \"$mvm\" --root \"$root\" \"$@\"; }
         mvm image import \"$archive\" >&2 && mvm run -d --name full --engine emu busybox sleep 1000 >&2
         head -c 9m /dev/zero >\"$root/filler\" 2>/dev/null
         mvm kill full >&2; mvm wait full >&2
         mvm rm full; mvm ps -aq; find \"$root/run/sandboxes\" \"$root/run/names\" \"$root/data/logs\" -mindepth 1",
    )
    .expect_code(0);
    assert_eq!(run.out(), "full\n", "{}", run.err());
}

#[test]
fn a_disk_that_becomes_full_during_a_run_takes_no_exit_code_away() {
    let run = on_small_disk(
        "8m",
        "mvm=\"$0\"; root=\"$1\"; archive=\"$2\"; mvm() { \"$mvm\" --root \"$root\" \"$@\"; }
         mvm image import \"$archive\" >&2
         fill() { until grep -qs up \"$root/../out\"; do sleep 0.1; done
                  head -c 9m /dev/zero >\"$root/filler\" 2>/dev/null; echo go; }
         fill | mvm run -i --name full --engine emu busybox sh -c 'echo up; read x; exit 7' >\"$root/../out\"
         echo code $?; mvm wait full; mvm rm full",
    )
    .expect_code(0);
    assert_eq!(run.out(), "code 7\n7\nfull\n", "{}", run.err());
    let told = run
        .err()
        .lines()
        .filter(|line| line.contains("cannot record how container full ended"))
        .count();
    assert!(told == 1 && run.err().contains("No space left on device"), "{}", run.err());
}

#[test]
fn a_disk_that_is_full_before_a_run() {
    let run = on_small_disk(
        "8m",
        "\"$0\" --root \"$1\" image import \"$2\" && head -c 9m /dev/zero > \"$1/filler\" 2>/dev/null; \
         \"$0\" --root \"$1\" run --rm --engine emu busybox true",
    )
    .expect_code(125);
    assert!(run.err().contains("No space left on device"), "{}", run.err());
    assert_eq!(run.err().lines().count(), 1, "{}", run.err());
}

#[test]
fn tmp_that_is_read_only() {
    // The world itself stays writable, in case it is below /tmp.
    let world = World::small();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg(
        "mount --bind /tmp /tmp && mount -o remount,bind,ro /tmp && ! touch /tmp/x 2>/dev/null && \
         mount --bind \"$1\" \"$1\" && mount -o remount,bind,rw \"$1\" && \
         \"$0\" --root \"$1\" run --rm --engine emu \"$2\" echo fine",
    );
    command.arg(world.binary()).arg(world.root()).arg(world.image_file("busybox"));
    let run = run_with(command, b"", Duration::from_secs(120)).expect_code(0);
    assert_eq!(run.out(), "fine\n");
}

#[test]
fn a_root_directory_that_cannot_be_written() {
    let world = World::new();
    let file = world.root().join("file");
    fs::write(&file, b"").unwrap();
    let mut command = Command::new(world.binary());
    command.arg("--root").arg(&file).args(["run", "busybox"]);
    let run = run_with(command, b"", Duration::from_secs(60)).expect_code(125);
    assert!(run.err().contains("--root DIR"), "{}", run.err());
    assert_eq!(run.err().lines().count(), 1, "{}", run.err());
}

#[test]
fn huge_pages_are_had_or_missed_by_number_and_remedy() {
    let world = World::small();
    for (kind, remedy) in [("2m", "nr_hugepages="), ("thp", "shmem_enabled")] {
        let args = ["run", "--rm", "--engine", "emu", "-m", "128m", "--hugepages", kind];
        let run = world.mvm(&[&args[..], &["busybox", "echo", "hi"]].concat());
        match run.code {
            0 => assert_eq!(run.out(), "hi\n"),
            125 => {
                assert!(run.err().contains("huge pages") && run.err().contains(remedy), "{run:?}");
                assert!(kind != "2m" || run.err().contains("64 huge pages"), "{run:?}");
            }
            _ => panic!("{run:?}"),
        }
    }
    fails(world, &["run", "--hugepages", "1g", "busybox"], 125, &["hugepages"]);
    let odd = ["run", "--rm", "--engine", "emu", "--hugepages", "2m", "-m", "127m", "busybox"];
    fails(world, &odd, 125, &["multiple of 2 MiB"]);
}
