//! `delete`: cleans up after a shim that is gone, however it went and however often this is called.
//!
//! containerd calls it when it notices, and does not get around to it when the task is removed at the
//! same time: the bundle, in which it would run this, is gone then. So the processes that stand for the
//! containers, which end with the shim, do the same ([`crate::vm::holder`]); who comes second finds
//! the work done.

use std::path::Path;

use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::MessageField;
use mvm_sandbox::recover;
use mvm_sandbox::registry::Registry;
use oci_spec::runtime::Spec;

use crate::cli::Flags;
use crate::host::Host;
use crate::launch;
use crate::vm::cgroup::Cgroups;
use crate::vm::{LABEL_BUNDLE, hooks, rootfs};

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
    // The group is written in the bundle, which may be gone: then so is whatever listened.
    let group = launch::group(&bundle, &flags.id).unwrap_or_else(|_| flags.id.clone());
    let socket = launch::socket(&host.layout()?, flags, &group)?;
    clear(host, &flags.id, &bundle, &socket)?;
    if let Ok(spec) = Spec::load(bundle.join("config.json")) {
        Cgroups::remove(&spec);
    }
    Ok(DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(crate::timestamp(std::time::SystemTime::now())),
        ..DeleteResponse::default()
    })
}

/// Removes what a shim that is gone has left of the container in `bundle`: its machine with the network,
/// the mounted root, the socket of the shim. The machine's state goes last: who does not find it
/// any more finds nothing else either.
///
/// # Errors
/// The machine cannot be ended, or its state cannot be removed.
pub fn clear(host: &dyn Host, id: &str, bundle: &Path, socket: &Path) -> anyhow::Result<()> {
    let layout = host.layout()?;
    let registry = Registry::open(layout.clone())?;
    let name = bundle.display().to_string();
    let mut places = Vec::new();
    for entry in registry.list()? {
        let Ok(state) = entry.state else { continue };
        if state.labels.get(LABEL_BUNDLE) == Some(&name) {
            recover::end_monitor(&state)?;
            places.push(entry.place);
        }
    }
    rootfs::unmount(&bundle.join("rootfs"));
    if let Err(e) = hooks::run_poststop(id, bundle) {
        tracing::warn!(container = id, "{e}");
    }
    launch::remove_dead(&layout, socket)?;
    for place in places {
        registry.remove(&place)?;
    }
    Ok(())
}
