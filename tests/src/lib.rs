//! What the end-to-end tests share: a place for state, a way to run `mvm` with a deadline, and the
//! same images as plain directories for comparison with the host.
//!
//! The tests want two variables, which `make` sets: `MVM`, the binary under test, and
//! `MVM_TEST_IMAGES`, the directory of the image recipes' output. `MVM_TEST_ENGINE` names the engine that guests run
//! on where a test is not about that ([`engine`]); `make test-kvm` sets it.

mod cable;
mod chroot;
mod containerd;
pub mod cri;
mod data;
mod engine;
pub mod hostmount;
pub mod http;
mod layers;
mod loopdev;
mod pty;
pub mod recipe;
pub mod registry;
mod run;
mod running;
mod shim;
pub mod unikernel;
mod world;

pub use cable::Cable;
pub use chroot::Chroot;
pub use containerd::{Containerd, IMAGE, NETWORK, plugin_dir};
pub use data::{clone_script, data_on_a_disk, expect_cloned};
pub use engine::{TEST_ENGINE, engine, engine_and_tier};
pub use layers::add_layers;
pub use loopdev::LoopDevice;
pub use pty::Terminal;
pub use run::{Finished, eventually, is_running, run_with};
pub use running::Running;
pub use shim::{Pod, Shim};
pub use world::World;
