//! The store over time: names, removal, several users at once, crashes and full disks.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Layer, Layout, Scratch};
use mvm_image::{Progress, PruneOptions, Silent, Store, StoreError};

fn layer(content: &str) -> Vec<u8> {
    Layer::new().file("f", content.as_bytes()).tar()
}

/// Imports an image with one file of its own.
fn import(scratch: &Scratch, content: &str, name: &str) -> mvm_image::Image {
    let layout = Layout::simple(&[layer(content)], Some(name));
    let path = scratch.write(&format!("{content}.tar"), &layout.tar());
    scratch.store.import_path(&path, None, &Silent).unwrap().pop().unwrap()
}

#[test]
fn missing_image_says_how_to_get_it() {
    let error = Scratch::new().store.resolve("debian:12").unwrap_err().to_string();
    assert!(
        error.contains("skopeo copy docker://debian:12 oci-archive:image.tar:debian:12"),
        "{error}"
    );
    assert!(error.contains("mvm image import image.tar"), "{error}");
    let error = Scratch::new().store.resolve("Not A Name").unwrap_err().to_string();
    assert!(error.contains("is not an image name"), "{error}");
}

#[test]
fn images_are_found_by_name_and_identity() {
    let scratch = Scratch::new();
    let image = import(&scratch, "a", "app:1");
    let hex = image.id().hex();
    for name in [
        "app:1",
        "docker.io/library/app:1",
        &hex[..12],
        &hex,
        &image.id().to_string(),
        &format!("app@{}", image.manifest()),
    ] {
        assert_eq!(scratch.store.resolve(name).unwrap().id(), image.id(), "{name}");
    }
    for name in ["app", "app:2", &hex[..3], "sha256:0000"] {
        let error = scratch.store.resolve(name).unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{name}: {error}");
    }
}

#[test]
fn list_inspect_and_usage_tell_what_is_there() {
    let scratch = Scratch::new();
    let image = import(&scratch, "a", "app:1");
    import(&scratch, "b", "other");
    let list = scratch.store.list().unwrap();
    assert_eq!(list.len(), 2);
    assert_eq!(list[0].name.as_deref(), Some("app:1"));
    assert_eq!(list[0].created.as_deref(), Some("2026-01-02T03:04:05Z"));
    assert_eq!(list[0].platform, "linux/amd64");
    assert!(list[0].size > 0);
    let inspect = scratch.store.inspect("app:1").unwrap();
    assert_eq!(inspect["Id"], image.id().to_string());
    assert_eq!(inspect["RepoTags"][0], "app:1");
    assert_eq!(inspect["Config"]["Cmd"][1], "b");
    assert_eq!(inspect["RootFS"]["Layers"].as_array().unwrap().len(), 1);
    let usage = scratch.store.usage().unwrap();
    assert!(usage.blobs > 0 && usage.rootfs > 0 && usage.temporary == 0);
}

#[test]
fn name_moves_to_the_image_imported_last() {
    let scratch = Scratch::new();
    let old = import(&scratch, "a", "app");
    let new = import(&scratch, "b", "app");
    assert_eq!(scratch.store.resolve("app").unwrap().id(), new.id());
    assert!(scratch.store.resolve(&old.id().hex()).unwrap().names().is_empty());
    let pruned = scratch.store.prune(PruneOptions::default()).unwrap();
    assert_eq!(pruned.images, [old.id()]);
    assert!(scratch.store.resolve(&old.id().hex()).is_err());
    assert!(scratch.store.resolve("app").is_ok());
}

#[test]
fn remove_takes_names_first_and_the_image_with_the_last() {
    let scratch = Scratch::new();
    let image = import(&scratch, "a", "one");
    import(&scratch, "a", "two");
    let id = image.id().short();
    let error = scratch.store.remove(&id, false).unwrap_err().to_string();
    assert!(error.contains("has several names (one:latest, two:latest)"), "{error}");
    let removed = scratch.store.remove("one", false).unwrap();
    assert_eq!((removed.untagged, removed.deleted), (vec!["one:latest".into()], None));
    let removed = scratch.store.remove("two", false).unwrap();
    assert_eq!(removed.deleted, Some(image.id()));
    assert!(removed.freed > 0);
    assert_eq!(scratch.leftovers(), ["index.json"]);
    import(&scratch, "a", "one");
    import(&scratch, "a", "two");
    assert_eq!(scratch.store.remove(&id, true).unwrap().untagged.len(), 2);
    assert_eq!(scratch.leftovers(), ["index.json"]);
}

#[test]
fn removal_keeps_what_other_images_need() {
    let scratch = Scratch::new();
    let shared = layer("shared");
    let path =
        scratch.write("a.tar", &Layout::simple(std::slice::from_ref(&shared), Some("a")).tar());
    scratch.store.import_path(&path, None, &Silent).unwrap();
    let path = scratch.write("b.tar", &Layout::simple(&[shared, layer("b")], Some("b")).tar());
    scratch.store.import_path(&path, None, &Silent).unwrap();
    scratch.store.remove("a", false).unwrap();
    let image = scratch.store.resolve("b").unwrap();
    fs::remove_file(scratch.store.rootfs(&image, &Silent).unwrap().path()).unwrap();
    scratch.store.rootfs(&image, &Silent).unwrap();
}

#[test]
fn leased_root_file_system_stays() {
    let scratch = Scratch::new();
    let image = import(&scratch, "a", "app");
    let lease = scratch.store.rootfs(&image, &Silent).unwrap();
    let path = lease.path().to_owned();
    let error = scratch.store.remove("app", false).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    assert!(scratch.store.prune(PruneOptions { all: true }).unwrap().images.is_empty());
    // The lease follows the descriptor, as it does into the process of a sandbox.
    let duplicate = lease.file().try_clone().unwrap();
    drop(lease);
    scratch.store.remove("app", true).unwrap();
    assert!(path.exists());
    assert_eq!(scratch.store.prune(PruneOptions::default()).unwrap().in_use, 1);
    drop(duplicate);
    let pruned = scratch.store.prune(PruneOptions::default()).unwrap();
    assert_eq!((pruned.in_use, path.exists()), (0, false));
    assert_eq!(scratch.leftovers(), ["index.json"]);
}

#[test]
fn lost_root_file_system_is_made_again() {
    let scratch = Scratch::new();
    let image = import(&scratch, "a", "app");
    let first = scratch.store.rootfs(&image, &Silent).unwrap();
    let bytes = fs::read(first.path()).unwrap();
    fs::remove_file(first.path()).unwrap();
    let again = scratch.store.rootfs(&image, &Silent).unwrap();
    assert!(fs::read(again.path()).unwrap() == bytes);
    fs::remove_file(again.path()).unwrap();
    let layer = image.layers()[0].digest;
    fs::remove_file(scratch.store.root().join("blobs/sha256").join(layer.hex())).unwrap();
    let error = scratch.store.rootfs(&image, &Silent).unwrap_err();
    assert!(matches!(error, StoreError::BlobMissing { digest } if digest == layer), "{error}");
}

#[test]
fn damaged_store_says_so_and_can_be_cleaned() {
    let scratch = Scratch::new();
    let image = import(&scratch, "a", "app");
    let blob =
        |digest: mvm_image::Digest| scratch.store.root().join("blobs/sha256").join(digest.hex());
    fs::write(blob(image.id()), "{}").unwrap();
    let error = scratch.store.resolve("app").unwrap_err().to_string();
    assert!(error.contains("its digest is wrong"), "{error}");
    scratch.store.remove("app", false).unwrap();
    assert_eq!(scratch.leftovers(), ["index.json"]);
    import(&scratch, "a", "app");
    assert!(scratch.store.resolve("app").is_ok());
}

#[test]
fn many_users_at_once_agree() {
    let scratch = Scratch::new();
    let paths: Vec<_> = (0..4)
        .map(|i| {
            let layout = Layout::simple(&[layer("shared"), layer(&format!("{i}"))], None);
            scratch.write(&format!("image-{i}.tar"), &layout.tar())
        })
        .collect();
    std::thread::scope(|scope| {
        for path in paths.iter().cycle().take(16) {
            scope.spawn(|| {
                let store = Store::open(scratch.store.root()).unwrap();
                let image = store.import_path(path, None, &Silent).unwrap().pop().unwrap();
                let lease = store.rootfs(&image, &Silent).unwrap();
                assert!(lease.size() > 0);
                // Busy is an answer, too.
                let _ = store.prune(PruneOptions::default());
            });
        }
    });
    assert_eq!(scratch.store.list().unwrap().len(), 4);
    scratch.store.prune(PruneOptions { all: true }).unwrap();
    assert_eq!(scratch.leftovers(), ["index.json"]);
}

/// Not a test of its own: what a process that is killed was doing.
#[test]
fn import_in_a_process_that_is_killed() {
    let Some(store) = std::env::var_os("TEST_STORE") else { return };
    let store = Store::open(store).unwrap();
    let source = std::env::var_os("TEST_SOURCE").unwrap();
    let _ = store.import_path(Path::new(&source), None, &Silent);
}

#[test]
fn killed_import_leaves_only_what_the_next_one_removes() {
    use std::io::Write;
    let scratch = Scratch::new();
    // A pipe that never ends, so that the import is in the middle of it.
    let source = scratch.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &source,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "import_in_a_process_that_is_killed"])
        .env("TEST_STORE", scratch.store.root())
        .env("TEST_SOURCE", &source)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut pipe = File::options().write(true).open(&source).unwrap();
    pipe.write_all(&layer("x")).unwrap();
    // The import holds its lock as long as it runs.
    let busy = scratch.store.prune(PruneOptions::default()).unwrap_err();
    assert!(matches!(busy, StoreError::Busy { .. }), "{busy}");
    let stray = scratch.store.root().join("tmp/stray");
    fs::write(&stray, "x").unwrap();
    Store::open(scratch.store.root()).unwrap();
    assert!(stray.exists(), "swept while an import was running");
    child.kill().unwrap();
    child.wait().unwrap();
    Store::open(scratch.store.root()).unwrap();
    assert!(scratch.leftovers().is_empty(), "{:?}", scratch.leftovers());
}

/// A file system of two megabytes, or none where this user cannot mount.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "none"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn full_disk_is_one_clear_error_and_leaves_nothing() {
    let Some(disk) = SmallDisk::new() else {
        eprintln!("skipped: this user cannot mount a small file system");
        return;
    };
    let scratch = Scratch::new();
    let store = Store::open(disk.0.path()).unwrap();
    let used = || store.usage().unwrap();
    let noise = |size: u32| -> Vec<u8> {
        (0..size).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    };
    // Too large as a layer, as a root file system, as a compressed archive.
    let tar = |size| Layer::new().file("noise", &noise(size)).tar();
    let zeros_then_noise = Layer::new().file("z", &vec![b'z'; 3 << 20]).tar();
    let sources = [
        ("layer.tar", Layout::simple(&[tar(3 << 20)], None).tar()),
        ("rootfs.tar", Layout::simple(&[zeros_then_noise], None).tar()),
        ("archive.tar.gz", common::gzip(&Layout::simple(&[tar(3 << 20)], None).tar())),
    ];
    for (name, bytes) in sources {
        let path = scratch.write(name, &bytes);
        let error = store.import_path(&path, None, &Silent).unwrap_err().to_string();
        assert!(error.starts_with("no space left"), "{name}: {error}");
        assert_eq!(used(), mvm_image::Usage::default(), "{name}");
    }
    let path = scratch.write("small.tar", &Layout::simple(&[tar(1000)], None).tar());
    store.import_path(&path, None, &Silent).unwrap();
}

#[test]
fn read_only_temporary_directory_does_not_matter() {
    let scratch = Scratch::new();
    let path = scratch.write("x.tar.gz", &common::gzip(&Layout::simple(&[layer("a")], None).tar()));
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "import_in_a_process_that_is_killed"])
        .env("TEST_STORE", scratch.store.root())
        .env("TEST_SOURCE", path)
        .env("TMPDIR", "/nonexistent")
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(scratch.store.list().unwrap().len(), 1);
}

#[test]
fn progress_counts_the_bytes_of_each_step() {
    #[derive(Default)]
    struct Steps(std::sync::Mutex<Vec<(String, Option<u64>, u64)>>);
    impl Progress for Steps {
        fn begin(&self, step: &str, total: Option<u64>) {
            self.0.lock().unwrap().push((step.into(), total, 0));
        }
        fn advance(&self, bytes: u64) {
            self.0.lock().unwrap().last_mut().unwrap().2 += bytes;
        }
    }
    let scratch = Scratch::new();
    let path = scratch.write("x.tar", &Layout::simple(&[layer("a"), layer("b")], None).tar());
    let steps = Steps::default();
    let start = Instant::now();
    scratch.store.import_path(&path, None, &steps).unwrap();
    assert!(start.elapsed() < Duration::from_secs(30));
    let steps = steps.0.into_inner().unwrap();
    let names: Vec<_> = steps.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["copy layer 1/2", "copy layer 2/2", "unpack layer 1/2", "unpack layer 2/2"]);
    assert!(steps.iter().all(|(_, total, done)| *total == Some(*done)), "{steps:?}");
}
