//! The command line as users see it. Its help texts are the reference: `docs/cli.md` is made from
//! them.

mod debug;
mod exec;
mod image;
mod install;
mod run;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub use debug::DebugArgs;
pub use exec::ExecArgs;
pub use image::{ImageCommand, PullArgs};
pub use install::InstallArgs;
pub use run::{Engine, Pull, RunArgs, TimingsFormat};

/// Run OCI images, each in its own microVM.
///
/// A container runs on its own Linux kernel in a virtual machine that starts in about the time a
/// program takes. Where the host has no usable hardware virtualization the same command runs the
/// same image on mvm's own emulation engine; `mvm doctor` tells which one and why.
#[derive(Debug, Parser)]
#[command(name = "mvm", version, propagate_version = false, disable_help_subcommand = true)]
pub struct Cli {
    /// Keep images, logs and state below DIR instead of the system's or the user's directories
    /// [env: MVM_ROOT]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub root: Option<PathBuf>,

    /// Read FILE instead of the system's and the user's mvm.toml [env: MVM_CONFIG]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub config: Option<PathBuf>,

    /// Tell on standard error what is being done
    #[arg(long, global = true, help_heading = "Global options")]
    pub debug: bool,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new container in its own microVM
    Run(Box<RunArgs>),
    /// Run a further command in a running container
    Exec(ExecArgs),
    /// Open a console in the guest itself, beside its containers; mvm.toml has to allow it
    Debug(DebugArgs),
    /// List containers
    #[command(visible_alias = "list")]
    Ps(PsArgs),
    /// Show what a container wrote
    Logs(LogsArgs),
    /// Ask containers to stop, and make them after a while
    Stop(StopArgs),
    /// Send a signal to containers
    Kill(KillArgs),
    /// Stop the vCPUs of containers
    Pause(NamesArgs),
    /// Let paused containers go on
    Unpause(NamesArgs),
    /// Change the memory of the machines of containers that run
    Update(UpdateArgs),
    /// Wait until containers end, and print their exit codes
    Wait(NamesArgs),
    /// Remove containers
    Rm(RmArgs),
    /// Show all that is known of containers, as JSON
    Inspect(NamesArgs),
    /// Show what containers cost
    Stats(StatsArgs),
    /// Show figures of all machines in the text form of Prometheus
    Metrics(MetricsArgs),
    /// Pull images from registries
    Pull(PullArgs),
    /// Manage images
    Image {
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Tell what this host can do, and what to do where it cannot
    Doctor(DoctorArgs),
    /// Install mvm on this host, for containerd too
    Install(InstallArgs),
    /// Show versions
    Version(VersionArgs),
    /// Print the completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the reference of the command line as Markdown
    #[command(hide = true)]
    GenDocs,
}

/// A form of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table for people
    Table,
    /// JSON, one object per line
    Json,
}

#[derive(Debug, Args)]
pub struct PsArgs {
    /// Show ended containers too
    #[arg(short, long)]
    pub all: bool,
    /// Show ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// The form of the list
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the container ends
    #[arg(short, long)]
    pub follow: bool,
    /// Begin each piece with its time
    #[arg(short, long)]
    pub timestamps: bool,
    /// Show the guest's console instead of the container's output
    #[arg(long, conflicts_with_all = ["follow", "timestamps"])]
    pub console: bool,
    /// Name or id
    pub container: String,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds until SIGKILL; without it, what the container was started with
    #[arg(short, long, value_name = "SECONDS")]
    pub time: Option<u32>,
    /// Names or ids
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct KillArgs {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    pub signal: String,
    /// Names or ids
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// Memory of the machine, up to what --memory-max of `mvm run` was and down to what it was started with: b, k, m or g
    #[arg(short, long, value_name = "SIZE", required = true)]
    pub memory: String,
    /// Names or ids
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// Remove running containers too
    #[arg(short, long)]
    pub force: bool,
    /// Names or ids
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct NamesArgs {
    /// Names or ids
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The form of the output
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Names or ids; all running ones if none is given
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// Write them to FILE, which is replaced in one step, instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests;
