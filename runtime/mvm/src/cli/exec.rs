//! `mvm exec`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
#[command(override_usage = "mvm exec [OPTIONS] CONTAINER COMMAND [ARG...]")]
pub struct ExecArgs {
    /// Keep standard input open and pass it to the process
    #[arg(short, long)]
    pub interactive: bool,

    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,

    /// Start the process and do not wait for it
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub detach: bool,

    /// Set a variable; without a value it is taken from mvm's own environment
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,

    /// Read variables from a file, one KEY=VALUE a line
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,

    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,

    /// User (and group), by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Give the process every capability
    #[arg(long)]
    pub privileged: bool,

    /// The container, by name or id, and the command to run in it
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_names = ["CONTAINER", "COMMAND"],
        num_args = 2..
    )]
    pub container_and_command: Vec<String>,
}

impl ExecArgs {
    /// The container.
    pub fn container(&self) -> &str {
        self.container_and_command.first().map_or("", String::as_str)
    }

    /// The command.
    pub fn command(&self) -> &[String] {
        self.container_and_command.get(1..).unwrap_or_default()
    }
}
