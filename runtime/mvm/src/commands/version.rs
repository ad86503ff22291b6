//! `mvm version`.

use serde_json::json;

use crate::cli::VersionArgs;
use crate::embedded;
use crate::output::{line, size};

pub fn version(args: &VersionArgs) -> anyhow::Result<()> {
    let engines = ["emu", "kvm"];
    let embedded::Sizes { kernel, initramfs, xfs } = embedded::sizes();
    if args.json {
        return line(
            &json!({
                "version": env!("CARGO_PKG_VERSION"),
                "agent_protocol": mvm_agent_protocol::PROTOCOL_VERSION,
                "engines": engines,
                "kernel_bytes": kernel,
                "initramfs_bytes": initramfs,
                "xfs_module_bytes": xfs,
            })
            .to_string(),
        );
    }
    let part = |bytes: Option<usize>| match bytes {
        Some(bytes) => size(bytes as u64),
        None => "not built in".into(),
    };
    line(&format!(
        "mvm {}\nengines:        {}\nagent protocol: {}\nguest kernel:   {}\nXFS module:     {}\ninitramfs:      {}",
        env!("CARGO_PKG_VERSION"),
        engines.join(", "),
        mvm_agent_protocol::PROTOCOL_VERSION,
        part(kernel),
        part(xfs),
        part(initramfs),
    ))
}
