//! `mvm install`.

use std::path::PathBuf;

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  sudo mvm install                          # for ctr, nerdctl and their like
  sudo mvm install --containerd             # and for Kubernetes: RuntimeClass with handler mvm
  sudo mvm install --containerd --undo

containerd has to be started anew after its configuration has changed; this command does not do that.";

/// Install mvm on this host: itself, containerd's shim, and containerd's configuration.
///
/// What is there already as it should be is left alone. The first change of containerd's
/// configuration keeps a copy of it, with .before-mvm at the end of its name, and what containerd
/// itself does not accept is not written.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InstallArgs {
    /// Install below DIR/bin
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    pub prefix: PathBuf,

    /// The host's root directory, where it is not /
    #[arg(long, value_name = "DIR")]
    pub destdir: Option<PathBuf>,

    /// Make the runtime `mvm` known to containerd's CRI, for Kubernetes
    #[arg(long)]
    pub containerd: bool,

    /// containerd's configuration
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml",
        requires = "containerd"
    )]
    pub containerd_config: PathBuf,

    /// Take back what this command would do
    #[arg(long)]
    pub undo: bool,
}
