//! `mvm debug`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
#[command(override_usage = "mvm debug [OPTIONS] CONTAINER [COMMAND [ARG...]]")]
pub struct DebugArgs {
    /// Take the shell from FILE of the host, statically linked, for images that have none
    #[arg(long, value_name = "FILE")]
    pub shell: Option<PathBuf>,

    /// The container, by name or id, and what to run in its guest in place of a shell
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_names = ["CONTAINER", "COMMAND"],
        num_args = 1..
    )]
    pub container_and_command: Vec<String>,
}

impl DebugArgs {
    /// The container.
    pub fn container(&self) -> &str {
        self.container_and_command.first().map_or("", String::as_str)
    }

    /// The command.
    pub fn command(&self) -> &[String] {
        self.container_and_command.get(1..).unwrap_or_default()
    }
}
