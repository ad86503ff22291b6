//! `mvm image`: every form in which an image comes, and what is made of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use mvm_tests::{Finished, Running, World, run_with};
use nix::sys::signal::Signal;

/// Runs a shell script with these arguments; it has to succeed.
#[track_caller]
fn sh(script: &str, args: &[&Path]) -> Finished {
    let mut command = Command::new("sh");
    command.args(["-ec", script, "sh"]).args(args);
    run_with(command, b"", Duration::from_secs(120)).expect_code(0)
}

/// The OCI layout directory of the busybox image.
fn layout(world: &World) -> std::path::PathBuf {
    let dir = world.root().join("layout");
    sh("mkdir \"$2\" && tar -C \"$2\" -xf \"$1\"", &[&world.image_file("busybox"), &dir]);
    dir
}

/// Names of manifest, configuration and layer of a layout with one image of one layer.
const PARTS: &str = r#"
    m=$(sed -E 's/.*"digest":"sha256:([0-9a-f]+)".*/\1/' index.json)
    c=$(sed -E 's/.*"config":\{[^}]*sha256:([0-9a-f]+)".*/\1/' blobs/sha256/$m)
    l=$(sed -E 's/.*"layers":\[\{[^]]*sha256:([0-9a-f]+)".*/\1/' blobs/sha256/$m)
"#;

fn import(world: &World, path: &Path) -> Finished {
    world.mvm(&["image", "import", path.to_str().unwrap()])
}

/// The one EROFS file of a world with one image.
fn erofs(world: &World) -> std::path::PathBuf {
    let about = world.mvm(&["image", "inspect", "busybox"]).expect_code(0).out();
    let about: serde_json::Value = serde_json::from_str(&about).unwrap();
    about[0]["RootFS"]["Erofs"].as_str().unwrap().into()
}

/// A line for every file of a tree: kind and mode, owner, size, target, contents.
const TREE: &str = "find . -mindepth 1 ! -path './proc*' ! -path './dev*' ! -path './sys*' \
    ! -path './etc/host*' | sort | while read -r f; do \
    if [ -L \"$f\" ]; then echo \"$f l $(readlink \"$f\")\"; \
    elif [ -f \"$f\" ]; then echo \"$f $(stat -c '%A %u %g %s' \"$f\") $(md5sum < \"$f\")\"; \
    else echo \"$f $(stat -c '%A %u %g' \"$f\")\"; fi; done";

#[test]
fn the_tree_in_the_guest_on_a_loop_mount_and_in_the_archive_is_the_same() {
    let world = World::with_images(&["busybox"]);
    let file = erofs(&world);
    sh("fsck.erofs \"$1\"", &[&file]);

    let unpacked = world.root().join("unpacked");
    let script = format!(
        "cd \"$1\"; {PARTS} mkdir \"$2\"; tar -C \"$2\" --numeric-owner -xpzf blobs/sha256/$l; cd \"$2\"; {TREE}"
    );
    let of_archive = sh(&script, &[&layout(&world), &unpacked]).out();
    let mounted = world.root().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec"]);
    command.arg(format!("mount -t erofs -o loop,ro \"$1\" \"$2\"; cd \"$2\"; {TREE}"));
    command.arg("sh").arg(&file).arg(&mounted);
    let of_mount = run_with(command, b"", Duration::from_secs(60)).expect_code(0).out();
    let of_guest = world.sh("busybox", &format!("cd /; {TREE}")).expect_code(0).out();
    assert!(of_archive.lines().count() > 20, "{of_archive}");
    compare("the loop mount", &of_archive, &of_mount);
    compare("the guest", &of_archive, &of_guest);
}

/// Compares two listings and shows where they differ, rather than both.
#[track_caller]
fn compare(what: &str, want: &str, found: &str) {
    let lines = |text: &str| -> BTreeMap<String, String> {
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs.map(|(name, rest)| (name.to_owned(), rest.to_owned())).collect()
    };
    let (want, found) = (lines(want), lines(found));
    for (name, about) in &want {
        assert_eq!(found.get(name), Some(about), "{name} in {what}");
    }
    let more: Vec<_> = found.keys().filter(|name| !want.contains_key(*name)).collect();
    assert!(more.is_empty(), "only in {what}: {more:?}");
}

#[test]
fn layouts_and_archives_of_every_form_give_a_container_that_runs() {
    let world = World::new();
    let dir = layout(&world);
    let runs = |image: &str| {
        let run = world.mvm(&["run", "--rm", image, "sh", "-c", "echo runs from $0", image]);
        assert_eq!(run.expect_code(0).out(), format!("runs from {image}\n"));
    };
    runs(dir.to_str().unwrap());

    let gz = world.root().join("layout.tar.gz");
    sh("tar -C \"$1\" -czf \"$2\" .", &[&dir, &gz]);
    runs(gz.to_str().unwrap());

    let docker = world.root().join("docker.tar");
    let script = format!(
        r#"cd "$1"; {PARTS}
        d=$(mktemp -d); cp blobs/sha256/$c $d/$c.json; mkdir $d/layer; zcat < blobs/sha256/$l > $d/layer/layer.tar
        echo "[{{\"Config\":\"$c.json\",\"RepoTags\":[\"from-docker:1\"],\"Layers\":[\"layer/layer.tar\"]}}]" > $d/manifest.json
        tar -C $d -cf "$2" manifest.json $c.json layer; rm -r $d"#
    );
    sh(&script, &[&dir, &docker]);
    assert_eq!(import(&world, &docker).expect_code(0).out(), "from-docker:1\n");
    runs("from-docker:1");

    let zstd = world.root().join("zstd");
    let script = format!(
        r#"cp -r "$1" "$2"; cd "$2"; {PARTS}
        zcat < blobs/sha256/$l | zstd -q -o z; rm blobs/sha256/$l; z=$(sha256sum < z | cut -c1-64); s=$(stat -c %s z); mv z blobs/sha256/$z
        sed -E "s/(\"layers\":\[\{{)[^]]*\]/\1\"mediaType\":\"application\/vnd.oci.image.layer.v1.tar+zstd\",\"digest\":\"sha256:$z\",\"size\":$s}}]/" blobs/sha256/$m > m
        rm blobs/sha256/$m; n=$(sha256sum < m | cut -c1-64); t=$(stat -c %s m); mv m blobs/sha256/$n
        sed -i -E "s/$m/$n/; s/(\"size\":)[0-9]+/\1$t/" index.json"#
    );
    sh(&script, &[&dir, &zstd]);
    assert!(import(&world, &zstd).expect_code(0).out().starts_with("busybox"));
    runs("busybox");
    let sources = world.mvm(&["image", "ls", "--format", "json"]).expect_code(0).out();
    for line in sources.lines() {
        let image: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(image["platform"], "linux/amd64");
    }
}

#[test]
fn images_are_listed_named_inspected_and_removed() {
    let world = World::with_images(&["busybox"]);
    let file = world.image_file("busybox");
    let path = file.to_str().unwrap();
    world.mvm(&["image", "import", "-t", "mine:2", path]).expect_code(0);
    let list = world.mvm(&["image", "ls"]).expect_code(0).out();
    assert!(list.contains("busybox:latest") && list.contains("mine:2"), "{list}");
    world.mvm(&["run", "--rm", "mine:2", "true"]).expect_code(0);
    world.mvm(&["image", "rm", "mine:2"]).expect_code(0);
    world.mvm(&["run", "--rm", "mine:2", "true"]).expect_code(125);
    let id = world.mvm(&["image", "ls", "-q"]).expect_code(0).out();
    world.mvm(&["run", "--rm", id.trim(), "true"]).expect_code(0);

    world.mvm(&["run", "-d", "--name", "user", "busybox", "sleep", "1000"]).expect_code(0);
    let used = world.mvm(&["image", "rm", "busybox"]).expect_code(125);
    assert!(used.err().contains("in use"), "{}", used.err());
    world.mvm(&["image", "prune", "-a"]).expect_code(0);
    assert!(world.mvm(&["image", "ls"]).out().contains("busybox"));
    world.mvm(&["rm", "-f", "user"]).expect_code(0);

    world.mvm(&["image", "rm", "busybox"]).expect_code(0);
    assert_eq!(world.mvm(&["image", "ls", "-q"]).expect_code(0).out(), "");
    world.mvm(&["image", "prune"]).expect_code(0);
    let left = sh("find \"$1/data/images\" -type f -size +4k", &[world.root()]).out();
    assert_eq!(left, "");
}

#[test]
fn two_imports_of_the_same_image_at_once() {
    let world = World::new();
    let file = world.image_file("musl");
    let path = file.to_str().unwrap();
    thread::scope(|scope| {
        let imports: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| world.mvm(&["run", "--rm", path, "echo", "both"])))
            .collect();
        for import in imports {
            assert_eq!(import.join().unwrap().expect_code(0).out(), "both\n");
        }
    });
    assert_eq!(world.mvm(&["image", "ls", "-q"]).expect_code(0).out().lines().count(), 1);
    assert_eq!(fs::read_dir(world.root().join("data/images/tmp")).unwrap().count(), 0);
}

/// An archive that takes long enough to import to be interrupted: a layer of random bytes.
fn large(world: &World) -> std::path::PathBuf {
    let dir = layout(world);
    let script = format!(
        r#"cd "$1"; {PARTS}
        mkdir t; head -c 300M /dev/urandom > t/large; tar -C t -cf layer large; rm -r t
        h=$(sha256sum < layer | cut -c1-64); s=$(stat -c %s layer); mv layer blobs/sha256/$h
        d=$(zcat < blobs/sha256/$l | sha256sum | cut -c1-64)
        sed "s/$d/$h/" blobs/sha256/$c > c; k=$(sha256sum < c | cut -c1-64); e=$(stat -c %s c); mv c blobs/sha256/$k
        printf '{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%s","size":%s}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:%s","size":%s}}]}}' $k $e $h $s > m
        n=$(sha256sum < m | cut -c1-64); t=$(stat -c %s m); mv m blobs/sha256/$n
        sed -i -E "s/$m/$n/; s/(\"size\":)[0-9]+/\1$t/" index.json"#
    );
    sh(&script, &[&dir]);
    dir
}

/// Runs `line`, with `signal` as soon as there is something in `tmp`. An image that it imported all the same is
/// removed.
fn interrupted(world: &World, line: &[&str], tmp: &Path, signal: Signal) -> Finished {
    let running = Running::start(world.command(line));
    while fs::read_dir(tmp).map_or(0, Iterator::count) == 0 && !running.is_over() {
        thread::sleep(Duration::from_millis(1));
    }
    running.signal(signal);
    let run = running.finish();
    if run.code == 0 {
        world.mvm(&["image", "rm", "busybox"]).expect_code(0);
    }
    run
}

#[test]
fn an_interrupted_import_leaves_nothing() {
    let world = World::new();
    let dir = large(&world);
    let tmp = world.root().join("data/images/tmp");
    // Makes the store, for which there are temporary files too.
    world.mvm(&["image", "ls"]).expect_code(0);
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        for verb in [&["image", "import"][..], &["run", "--rm"]] {
            let mut line = verb.to_vec();
            line.push(dir.to_str().unwrap());
            // On a busy machine the import may be over before the signal is sent: then again.
            let run = (0..50)
                .map(|_| interrupted(&world, &line, &tmp, signal))
                .find(|run| run.code != 0)
                .expect("one of fifty imports is interrupted")
                .expect_code(code);
            assert!(run.err().contains(&format!("interrupted by {signal}")), "{}", run.err());
            assert_eq!(run.err().lines().count(), 1, "{}", run.err());
            assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0, "temporary files are left");
        }
    }
    assert_eq!(world.mvm(&["image", "ls", "-q"]).expect_code(0).out(), "");
    assert_eq!(world.mvm(&["ps", "-aq"]).expect_code(0).out(), "");
}
