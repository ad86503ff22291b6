//! Pulls from a registry that keeps to the rules, and from some that do not.

mod registry;

use std::sync::atomic::{AtomicU64, Ordering};

use mvm_image::{Image, Progress, Silent, Store};
use mvm_registry::{PullError, PullOptions};
use registry::{Fault, INDEX, Registry};
use serde_json::json;

struct World {
    _dir: tempfile::TempDir,
    store: Store,
    registry: Registry,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Self { _dir: dir, store, registry: Registry::start() }
    }

    fn pull(&self, tag: &str) -> Result<Vec<Image>, PullError> {
        self.pull_with(tag, &Silent)
    }

    fn pull_with(&self, tag: &str, progress: &dyn Progress) -> Result<Vec<Image>, PullError> {
        let name = self.registry.name(tag);
        mvm_registry::pull(&self.store, &name, PullOptions::default(), progress)
    }

    /// Whatever failed, nothing that could be run is there.
    fn is_empty(&self) -> bool {
        self.store.list().unwrap().is_empty()
    }
}

/// So much that it comes in several pieces.
fn content() -> Vec<u8> {
    (0..3_u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

#[test]
fn an_image_comes_whole_and_only_once() {
    let world = World::new();
    world.registry.image(Some("v1"), "amd64", b"one");
    let images = world.pull("v1").unwrap();
    let name = world.registry.name("v1").to_string();
    assert_eq!(images[0].names().iter().map(ToString::to_string).collect::<Vec<_>>(), [&*name]);
    assert_eq!(world.registry.blobs_asked().len(), 2);
    assert!(world.store.resolve(&name).is_ok());
    // What is in the store need not come again.
    world.pull("v1").unwrap();
    assert_eq!(world.registry.blobs_asked(), [""; 0]);
    // A tag that has moved.
    world.registry.image(Some("v1"), "amd64", b"two");
    assert_ne!(world.pull("v1").unwrap()[0].id(), images[0].id());
    assert_eq!(world.registry.blobs_asked().len(), 2);
}

#[test]
fn of_several_platforms_only_ours_is_fetched() {
    let world = World::new();
    let manifests: Vec<_> = [("arm64", "other"), ("amd64", "ours")]
        .into_iter()
        .map(|(architecture, content)| {
            let mut descriptor = world.registry.image(None, architecture, content.as_bytes());
            descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
            descriptor
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    let index = world.registry.document(Some("multi"), INDEX, &index);
    world.pull("multi").unwrap();
    assert_eq!(world.registry.blobs_asked().len(), 2);

    let only = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifests[0]]});
    world.registry.document(Some("arm"), INDEX, &only);
    let error = world.pull("arm").unwrap_err();
    assert!(error.to_string().contains("linux/arm64"), "{error}");

    // By the digest of the index, which is the name that others give.
    let digest = index["digest"].as_str().unwrap();
    let name = world.registry.name("multi").to_string().replace(":multi", "");
    let name = format!("{name}@{digest}").parse().unwrap();
    mvm_registry::pull(&world.store, &name, PullOptions::default(), &Silent).unwrap();
    assert!(world.store.resolve(&name.to_string()).is_ok());
}

#[test]
fn what_was_cut_off_goes_on_where_it_was() {
    let world = World::new();
    world.registry.image(Some("v1"), "amd64", &content());
    world.registry.set(|b| b.fault = Fault::Cut { after: 700_000, times: 4 });
    world.pull("v1").unwrap();
    let asked = world.registry.blobs_asked();
    assert!(asked.iter().any(|path| path.ends_with(" bytes=700000-")), "{asked:?}");
    assert!(asked.iter().any(|path| path.ends_with(" bytes=1400000-")), "{asked:?}");
}

#[test]
fn a_registry_without_ranges_begins_anew() {
    let world = World::new();
    world.registry.image(Some("v1"), "amd64", &content());
    world.registry.set(|b| b.fault = Fault::NoRanges { after: 500_000 });
    world.pull("v1").unwrap();
}

/// Cancels when so many bytes have come.
struct Impatient {
    come: AtomicU64,
    enough: u64,
}

impl Progress for Impatient {
    fn advance(&self, bytes: u64) {
        self.come.fetch_add(bytes, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.come.load(Ordering::Relaxed) >= self.enough
    }
}

#[test]
fn the_next_pull_goes_on_after_one_that_was_cancelled() {
    let world = World::new();
    world.registry.image(Some("v1"), "amd64", &content());
    // Nothing more comes after some of it, until it is cancelled.
    world.registry.set(|b| b.fault = Fault::Cut { after: 1_000_000, times: usize::MAX });
    let impatient = Impatient { come: AtomicU64::new(0), enough: 2_000_000 };
    let error = world.pull_with("v1", &impatient).unwrap_err();
    assert!(matches!(error, PullError::Cancelled), "{error}");
    assert!(world.is_empty());
    world.registry.blobs_asked();
    world.registry.set(|b| b.fault = Fault::None);
    world.pull("v1").unwrap();
    let asked = world.registry.blobs_asked();
    assert!(asked.iter().all(|path| path.contains(" bytes=")), "{asked:?}");
}

#[test]
fn a_server_that_recovers_is_asked_again_and_one_that_does_not_is_given_up() {
    let world = World::new();
    world.registry.image(Some("v1"), "amd64", b"one");
    world.registry.set(|b| b.fault = Fault::Unavailable { times: 2 });
    world.pull("v1").unwrap();
    world.registry.image(Some("v2"), "amd64", b"two");
    world.registry.set(|b| b.fault = Fault::Unavailable { times: usize::MAX });
    let error = world.pull("v2").unwrap_err();
    assert!(matches!(error, PullError::Registry { .. }), "{error}");
    assert!(error.to_string().contains("503"), "{error}");
}

#[test]
fn lies_are_found_out() {
    for (fault, says) in [(Fault::Damaged, "damaged"), (Fault::Long, "longer than")] {
        let world = World::new();
        world.registry.image(Some("v1"), "amd64", b"one");
        world.registry.set(|b| b.fault = fault);
        let error = world.pull("v1").unwrap_err();
        assert!(error.to_string().contains(says), "{fault:?}: {error}");
        assert!(world.is_empty());
        // And nothing of the lie is kept.
        world.registry.set(|b| b.fault = Fault::None);
        world.pull("v1").unwrap();
    }
}

#[test]
fn documents_of_strangers_are_refused() {
    let world = World::new();
    for (tag, bytes) in [
        ("empty", &b""[..]),
        ("text", b"hello"),
        ("list", b"[]"),
        ("nothing", br#"{"schemaVersion": 2}"#),
        ("index", br#"{"schemaVersion": 2, "manifests": 7}"#),
        ("sizes", br#"{"schemaVersion": 2, "config": {"size": -1}, "layers": []}"#),
    ] {
        world.registry.put("manifests", tag, bytes);
        let error = world.pull(tag).unwrap_err();
        assert!(matches!(error, PullError::Source(_)), "{tag}: {error:?}");
    }
    // An index that holds another image than its digest says.
    let descriptor = world.registry.image(None, "amd64", b"one");
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]});
    world.registry.document(Some("swapped"), INDEX, &index);
    let digest = descriptor["digest"].as_str().unwrap();
    world.registry.put("manifests", digest, br#"{"schemaVersion": 2}"#);
    assert!(world.pull("swapped").is_err());
    // More bytes than any image has.
    let huge = json!({"mediaType": "x", "digest": digest, "size": 1_u64 << 50});
    let config = json!({
        "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": 2,
    });
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [huge]});
    world.registry.document(Some("huge"), registry::MANIFEST, &manifest);
    let huge = world.pull("huge");
    assert!(huge.is_err() && world.is_empty(), "{huge:?}");
}

#[test]
fn refusals_say_what_to_do() {
    let world = World::new();
    world.registry.image(Some("v1"), "amd64", b"one");
    let error = world.pull("v2").unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
    world.registry.set(|b| b.login = true);
    let error = world.pull("v1").unwrap_err();
    assert!(error.to_string().contains("docker login 127.0.0.1:"), "{error}");
    world.registry.set(|b| (b.login, b.token) = (false, true));
    world.pull("v1").unwrap();

    let nobody = "127.0.0.1:1/app".parse().unwrap();
    let error = mvm_registry::pull(&world.store, &nobody, PullOptions::default(), &Silent);
    let error = error.unwrap_err();
    assert!(matches!(error, PullError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}
