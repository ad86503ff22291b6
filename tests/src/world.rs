//! The binary under test with a root directory of its own.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::engine::under_test;
use crate::{Finished, run_with};

/// Long enough for anything that is not stuck, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// `mvm` with its own `--root`, which goes when the world does.
#[derive(Debug)]
pub struct World {
    mvm: PathBuf,
    images: PathBuf,
    root: PathBuf,
    /// Removes the root with the world; the shared worlds of a test program are never dropped, and
    /// have fixed places which the next run clears.
    _guard: Option<TempDir>,
}

/// Test programs whose subject is who chooses the engine: they get no engine under test.
const CHOOSERS: &[&str] = &["engine_choice"];

/// The name of this test program, without cargo's hash.
fn program() -> String {
    let program = env::current_exe().expect("this program");
    let program = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    program.rsplit_once('-').map_or(program.clone(), |(name, _)| name.to_owned())
}

impl World {
    /// A fresh world: no image, no container.
    ///
    /// # Panics
    /// If `MVM` or `MVM_TEST_IMAGES` is not set, or there is no place for the root.
    pub fn new() -> Self {
        let guard =
            tempfile::Builder::new().prefix("mvm-").tempdir().expect("a temporary directory");
        Self::at(guard.path().to_owned(), Some(guard))
    }

    fn at(root: PathBuf, guard: Option<TempDir>) -> Self {
        Self { mvm: variable("MVM"), images: variable("MVM_TEST_IMAGES"), root, _guard: guard }
    }

    /// A world at a place that is this test program's own, whatever a former run left there.
    fn lasting(name: &str, images: &[&str]) -> Self {
        let program = program();
        let root = variable("MVM_TEST_IMAGES").join("worlds").join(format!("{program}-{name}"));
        let world = Self::at(root, None);
        world.end_all();
        let _ = fs::remove_dir_all(&world.root);
        fs::create_dir_all(&world.root).expect("a place for the world");
        world.import(images);
        world
    }

    /// The world that the tests of one process share, with all test images imported.
    pub fn shared() -> &'static World {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(|| World::lasting("all", &["busybox", "musl", "debian"]))
    }

    /// The same with the busybox image alone, for tests that look at `mvm` rather than at programs.
    pub fn small() -> &'static World {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(|| World::lasting("small", &["busybox"]))
    }

    /// A fresh world with these test images.
    #[track_caller]
    pub fn with_images(images: &[&str]) -> Self {
        let world = World::new();
        world.import(images);
        world
    }

    #[track_caller]
    fn import(&self, images: &[&str]) {
        for image in images {
            let file = self.image_file(image);
            let file = file.to_str().expect("a UTF-8 path");
            self.mvm(&["image", "import", file]).expect_code(0);
        }
    }

    /// Bytes of all files below the root, sparse ones as far as they are there.
    pub fn size(&self) -> u64 {
        fn walk(dir: &Path) -> u64 {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            let sizes = entries.map(|entry| match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => walk(&entry.path()),
                Ok(metadata) => metadata.blocks() * 512,
                Err(_) => 0,
            });
            sizes.sum()
        }
        walk(&self.root)
    }

    /// What `mvm inspect` says of a container.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn inspect(&self, name: &str) -> serde_json::Value {
        let out = self.mvm(&["inspect", name]).expect_code(0).out();
        let list: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        list[0].clone()
    }

    /// The process that is this container's machine.
    ///
    /// # Panics
    /// If it has none.
    #[track_caller]
    pub fn monitor(&self, name: &str) -> Pid {
        let about = self.inspect(name);
        let pid = about["monitor"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        Pid::from_raw(pid.unwrap_or_else(|| panic!("no monitor in {about}")))
    }

    /// Kills that process.
    #[track_caller]
    pub fn kill_monitor(&self, name: &str) {
        kill(self.monitor(name), Signal::SIGKILL).expect("a monitor to be killed");
    }

    /// Ends what runs: machines of a failed test would live on.
    fn end_all(&self) {
        let Ok(list) = self.command(&["ps", "-aq"]).output() else { return };
        for id in String::from_utf8_lossy(&list.stdout).split_whitespace() {
            let _ = self.command(&["rm", "-f", id]).output();
        }
    }

    /// The file that a recipe made.
    pub fn image_file(&self, image: &str) -> PathBuf {
        self.images.join(format!("{image}.tar"))
    }

    /// The directory of the image recipes' output, where the guest's kernel and initramfs are too.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// The `--root` directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The binary under test.
    pub fn binary(&self) -> &Path {
        &self.mvm
    }

    /// A command line of `mvm` in this world, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.mvm);
        command.arg("--root").arg(&self.root).args(args);
        command.env_remove("MVM_ROOT").env_remove("MVM_ENGINE");
        // Neither the host's settings nor those of whoever runs the tests.
        command.env("MVM_CONFIG", "/dev/null");
        if let Some(engine) = under_test()
            && !CHOOSERS.contains(&&*program())
        {
            command.env("MVM_ENGINE", engine);
        }
        command
    }

    /// Runs `mvm ARGS` with empty input.
    #[track_caller]
    pub fn mvm(&self, args: &[&str]) -> Finished {
        self.mvm_with(args, b"")
    }

    /// Runs `mvm ARGS` with `input`.
    #[track_caller]
    pub fn mvm_with(&self, args: &[&str], input: &[u8]) -> Finished {
        run_with(self.command(args), input, DEADLINE)
    }

    /// Runs a shell script in a new container of `image`.
    #[track_caller]
    pub fn sh(&self, image: &str, script: &str) -> Finished {
        self.mvm(&["run", "--rm", image, "sh", "-c", script])
    }
}

pub(crate) fn variable(name: &str) -> PathBuf {
    let value = env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: use `make e2e`"));
    PathBuf::from(value)
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.end_all();
    }
}
