//! `run --detach`: the same command again as a process in a session of its own, which reports the
//! container's id over its standard output once the container runs.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use anyhow::Context;

/// Starts the background process and waits until its container runs. The exit code is for us; what
/// went wrong the other process has told on our standard error.
pub fn start() -> anyhow::Result<i32> {
    let mut child = Command::new("/proc/self/exe")
        .args(background_args(std::env::args_os().skip(1)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the background process")?;
    let mut id = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut id).context("cannot hear the background process")?;
    }
    if id.ends_with('\n') {
        crate::output::print(&id)?;
        return Ok(0);
    }
    let status = child.wait().context("cannot wait for the background process")?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// The arguments with `--background` after the subcommand, which is the first argument that is no
/// global option.
fn background_args(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut out = Vec::new();
    let (mut found, mut value_next) = (false, false);
    for arg in args {
        let is_option = arg.to_string_lossy().starts_with('-');
        let is_subcommand = !found && !value_next && !is_option;
        value_next = (arg == "--root" || arg == "--config") && !found;
        out.push(arg);
        if is_subcommand {
            out.push("--background".into());
            found = true;
        }
    }
    out
}

/// In the background process: leaves the terminal's session, so that its Ctrl-C and its end are
/// not ours.
pub fn leave_session() -> anyhow::Result<()> {
    nix::unistd::setsid().context("cannot start a session")?;
    Ok(())
}

/// In the background process: reports the id, and lets go of everything of the caller's.
pub fn report(id: &str) -> anyhow::Result<()> {
    // If nobody listens the caller was interrupted, and the container has to go too.
    crate::output::line(id)?;
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")?;
    nix::unistd::dup2_stdout(&null).context("cannot let go of standard output")?;
    nix::unistd::dup2_stderr(&null).context("cannot let go of standard error")?;
    std::env::set_current_dir("/").context("cannot leave the working directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(list: &[&str]) -> Vec<String> {
        let os = list.iter().map(OsString::from);
        background_args(os).into_iter().map(|a| a.into_string().unwrap()).collect()
    }

    #[test]
    fn flag_goes_after_the_subcommand() {
        assert_eq!(args(&["run", "-d", "run"]), ["run", "--background", "-d", "run"]);
        assert_eq!(
            args(&["--root", "run", "--debug", "run", "-d", "i"]),
            ["--root", "run", "--debug", "run", "--background", "-d", "i"]
        );
        assert_eq!(
            args(&["--config", "c.toml", "run", "i"]),
            ["--config", "c.toml", "run", "--background", "i"]
        );
        assert_eq!(args(&["--root=/x", "run", "i"]), ["--root=/x", "run", "--background", "i"]);
    }
}
