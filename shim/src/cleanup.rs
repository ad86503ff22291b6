//! `delete`: cleans up after a shim that is gone, however it went and however often this is called.

use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::MessageField;
use mvm_sandbox::recover;
use mvm_sandbox::registry::Registry;
use oci_spec::runtime::Spec;

use crate::cli::Flags;
use crate::host::Host;
use crate::vm::cgroup::Cgroups;
use crate::vm::{LABEL_BUNDLE, rootfs};

/// Exit status of whatever ran: it was killed.
const KILLED: u32 = 137;

/// Carries out `delete`.
///
/// # Errors
/// The machine cannot be ended, or its state cannot be removed.
pub fn delete(host: &dyn Host, flags: &Flags) -> anyhow::Result<DeleteResponse> {
    let bundle = match &flags.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().context("cannot find the bundle")?,
    };
    let layout = host.layout()?;
    let registry = Registry::open(layout.clone())?;
    let name = bundle.display().to_string();
    for entry in registry.list()? {
        let Ok(state) = entry.state else { continue };
        if state.labels.get(LABEL_BUNDLE) == Some(&name) {
            recover::end_monitor(&state)?;
            registry.remove(&entry.place)?;
        }
    }
    rootfs::unmount(&bundle.join("rootfs"));
    if let Ok(spec) = Spec::load(bundle.join("config.json")) {
        Cgroups::remove(&spec);
    }
    // The group is written in the bundle, which may be gone: then so is whatever listened.
    let group = crate::launch::group(&bundle, &flags.id).unwrap_or_else(|_| flags.id.clone());
    let socket = crate::launch::socket(&layout, flags, &group)?;
    remove_dead(&socket);
    Ok(DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(crate::timestamp(std::time::SystemTime::now())),
        ..DeleteResponse::default()
    })
}

/// Removes a socket at which nobody listens any more.
fn remove_dead(socket: &Path) {
    if UnixStream::connect(socket).is_err() {
        // It may be gone already.
        let _ = std::fs::remove_file(socket);
    }
}
