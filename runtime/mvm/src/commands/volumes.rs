//! `--volume` and `--mount`.

use anyhow::Context as _;
use mvm_sandbox::spec::Tmpfs;
use mvm_sandbox::spec::volumes::{self, Mount, Volume};

use crate::cli::RunArgs;
use crate::output::complain;

/// What is to be shared; memory file systems join `tmpfs`. Missing directories are made where docker
/// makes them.
pub(super) fn all(args: &RunArgs, tmpfs: &mut Vec<Tmpfs>) -> anyhow::Result<Vec<Volume>> {
    let (mut binds, mut notices) = (Vec::new(), Vec::new());
    for text in &args.volume {
        let asked = volumes::parse_volume(text).context("--volume")?;
        binds.push(asked.mount);
        notices.extend(asked.notices);
    }
    for text in &args.mount {
        match volumes::parse_mount(text).context("--mount")?.mount {
            Mount::Bind(bind) => binds.push(bind),
            Mount::Tmpfs(memory) => tmpfs.push(memory),
        }
    }
    // The process that stays repeats what was said already.
    if !args.background {
        notices.iter().for_each(|notice| complain(&format!("note: {notice}")));
    }
    Ok(volumes::resolve(&binds, tmpfs)?)
}
