//! One module per subcommand, or per few that belong together.

mod attach;
mod bare;
mod debug;
mod disk;
mod docs;
mod doctor;
mod exec;
mod image;
mod install;
mod life;
mod list;
mod logs;
mod metrics;
mod modules;
pub mod monitor;
mod run;
pub mod shim;
mod stats;
mod unikernel;
mod version;
mod volumes;

use std::path::PathBuf;

use clap::CommandFactory;
use mvm_sandbox::layout::Layout;
use mvm_sandbox::registry::Registry;

use crate::cli::{Cli, Command};
use crate::settings::Places;

/// What every subcommand works on.
#[derive(Debug)]
pub struct Context {
    layout: Layout,
    /// Where settings are, which only those who want them read: a bad line in a file is no reason
    /// not to stop a container.
    settings: Places,
}

impl Context {
    fn new(cli: &Cli) -> anyhow::Result<Self> {
        let settings = Places::current(cli.config.as_deref());
        Ok(Self { layout: layout(cli.root.clone())?, settings })
    }

    fn registry(&self) -> anyhow::Result<Registry> {
        Ok(Registry::open(self.layout.clone()).map_err(mvm_sandbox::Error::from)?)
    }
}

/// The directories: below `root`, else below `MVM_ROOT`, else the usual ones.
fn layout(root: Option<PathBuf>) -> anyhow::Result<Layout> {
    let variable = std::env::var_os("MVM_ROOT").filter(|v| !v.is_empty()).map(PathBuf::from);
    Ok(Layout::new(root.or(variable).as_deref())?)
}

/// Carries out what the command line says, and returns the exit code.
pub fn dispatch(cli: &Cli) -> anyhow::Result<i32> {
    let context = || Context::new(cli);
    match &cli.command {
        Command::Run(args) if args.unikernel.is_some() => return bare::run(&context()?, args),
        Command::Run(args) => return run::run(&context()?, args),
        Command::Exec(args) => return exec::exec(&context()?, args),
        Command::Debug(args) => return debug::debug(&context()?, args),
        Command::Ps(args) => list::ps(&context()?, args)?,
        Command::Inspect(args) => list::inspect(&context()?, args)?,
        Command::Logs(args) => logs::logs(&context()?, args)?,
        Command::Stop(args) => return life::stop(&context()?, args),
        Command::Kill(args) => return life::kill(&context()?, args),
        Command::Pause(args) => return life::pause(&context()?, args),
        Command::Unpause(args) => return life::unpause(&context()?, args),
        Command::Update(args) => return life::update(&context()?, args),
        Command::Wait(args) => return life::wait(&context()?, args),
        Command::Rm(args) => return life::rm(&context()?, args),
        Command::Stats(args) => stats::stats(&context()?, args)?,
        Command::Metrics(args) => metrics::metrics(&context()?, args)?,
        Command::Pull(args) => return image::pull(&context()?, args),
        Command::Image { command } => return image::image(&context()?, command),
        Command::Doctor(args) => return doctor::doctor(&context()?, args),
        Command::Install(args) => install::install(args)?,
        Command::Version(args) => version::version(args)?,
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "mvm", &mut text);
            crate::output::print(&String::from_utf8_lossy(&text))?;
        }
        Command::GenDocs => crate::output::print(&docs::reference())?,
    }
    Ok(0)
}
