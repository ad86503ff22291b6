//! `mvm`: runs OCI images, each in its own microVM.
//!
//! This crate is thin: it understands flags, speaks to people and terminals, and leaves the rest to
//! `mvm-sandbox` and `mvm-image`. The same file is also the monitor of each machine
//! (`mvm monitor`, see `mvm-vmm`) and of its file server (`mvm file-server`, see `mvm-fs`), and under
//! the name `containerd-shim-mvm-v1` containerd's shim.

mod cli;
mod commands;
mod detach;
mod embedded;
mod env_file;
mod images;
mod interrupt;
mod logging;
mod output;
mod progress;
mod settings;
mod signals;
mod terminal;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use mvm_sandbox::EXIT_FAILURE;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let (program, first) = (args.next(), args.next());
    let first = first.as_deref().and_then(std::ffi::OsStr::to_str);
    // These come first: the shim starts them by this file.
    if first == Some(mvm_vmm::monitor::SUBCOMMAND) {
        return commands::monitor::main();
    }
    if first == Some(mvm_fs::SUBCOMMAND) {
        return mvm_fs::main();
    }
    if first == Some(mvm_fs::follow::SUBCOMMAND) {
        return mvm_fs::follow::main();
    }
    if first == Some(containerd_shim_mvm::vm::holder::SUBCOMMAND) {
        return commands::shim::holder();
    }
    if containerd_shim_mvm::is_shim(program.as_deref()) {
        return commands::shim::main();
    }
    let code = match cli::Cli::try_parse() {
        Ok(cli) => dispatch(&cli),
        Err(error) => refuse(&error, &command_of(std::env::args_os().skip(1))),
    };
    // Only the low byte reaches the parent, as with any process.
    ExitCode::from(code.to_le_bytes()[0])
}

fn dispatch(cli: &cli::Cli) -> i32 {
    logging::init(cli.debug);
    match commands::dispatch(cli) {
        Ok(code) => code,
        Err(error) if output::is_closed(&error) => output::EXIT_CLOSED,
        Err(error) => {
            output::complain(&output::causes(&error));
            if let Some(interrupt::Interrupted(signal)) = error.downcast_ref() {
                return 128 + signal;
            }
            error
                .downcast_ref::<mvm_sandbox::Error>()
                .map_or(EXIT_FAILURE, mvm_sandbox::Error::exit_code)
        }
    }
}

/// Help and version go to standard output with success; a wrong command line is our own failure.
fn refuse(error: &clap::Error, command: &str) -> i32 {
    use clap::error::ErrorKind::{DisplayHelpOnMissingArgumentOrSubcommand, MissingSubcommand};
    if !error.use_stderr()
        || matches!(error.kind(), DisplayHelpOnMissingArgumentOrSubcommand | MissingSubcommand)
    {
        // If even this cannot be written there is nobody left to tell.
        let _ = error.print();
        return if error.use_stderr() { EXIT_FAILURE } else { 0 };
    }
    let mut line = one_line(&error.render().to_string(), command);
    if let Some(instead) = docker_word(error).and_then(|word| instead_of(&word)) {
        line = format!("{line}; {instead}");
    }
    output::complain(&line);
    EXIT_FAILURE
}

/// The flag or subcommand that is not ours.
fn docker_word(error: &clap::Error) -> Option<String> {
    use clap::error::{ContextKind, ContextValue};
    let kinds = [ContextKind::InvalidArg, ContextKind::InvalidSubcommand];
    kinds.into_iter().find_map(|kind| match error.get(kind) {
        Some(ContextValue::String(word)) => Some(word.clone()),
        _ => None,
    })
}

/// What there is, or is not yet, where docker has `word`.
fn instead_of(word: &str) -> Option<&'static str> {
    Some(match word {
        "--volumes-from" | "--volume-driver" => {
            "there are no named volumes; --volume shows directories and files of the host"
        }
        "-P" | "--publish-all" => "ports are published one by one: -p HOST:GUEST",
        "--dns" => "names are looked up as the network's configuration says",
        "--platform" => "images are for linux/amd64",
        "images" => "images are listed by `mvm image ls`",
        "rmi" => "images are removed by `mvm image rm`",
        "load" => "images come in by `mvm image import FILE`",
        "info" => "the host is looked at by `mvm doctor`",
        "create" | "start" | "restart" => {
            "a container is made and started by `mvm run`, and runs once"
        }
        "attach" => "what a container writes is followed by `mvm logs -f`",
        "cp" => "files go in and out by --volume, or through `mvm exec -i CONTAINER tar`",
        "build" => "images are built by other tools, and come in by `mvm image import FILE`",
        _ => return None,
    })
}

/// The command that `args` begin with, as far as it is known.
fn command_of(args: impl Iterator<Item = std::ffi::OsString>) -> String {
    let (mut command, mut words) = (cli::Cli::command(), "mvm".to_owned());
    for arg in args.filter(|arg| !arg.as_encoded_bytes().starts_with(b"-")) {
        let Some(next) = command.find_subcommand(&arg).cloned() else { break };
        words = format!("{words} {}", next.get_name());
        command = next;
    }
    words
}

/// Clap's message without its paragraphs: what is wrong, its tip, and where the help on `command` is.
fn one_line(message: &str, command: &str) -> String {
    let about = message.split("Usage:").next().unwrap_or(message);
    let about: Vec<&str> = about.split_whitespace().collect();
    let about = about.join(" ");
    let about = about.strip_prefix("error: ").unwrap_or(&about);
    let about = about.strip_suffix("For more information, try '--help'.").unwrap_or(about);
    // Clap's last resort, which never helps here; its other tips name what was meant.
    let about = about.split(" tip: to pass ").next().unwrap_or(about).replace(" tip: ", "; ");
    format!("{}; see `{command} --help`", about.trim().trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn dockers_words_are_answered() {
        for (args, want) in [
            (&["mvm", "run", "--volumes-from", "x", "i"][..], "no named volumes"),
            (&["mvm", "run", "--dns=10.0.0.1", "i"], "the network's configuration"),
            (&["mvm", "load"], "mvm image import"),
            (&["mvm", "restart", "x"], "runs once"),
        ] {
            let error = cli::Cli::try_parse_from(args).unwrap_err();
            let instead = docker_word(&error).and_then(|word| instead_of(&word));
            assert!(instead.is_some_and(|text| text.contains(want)), "{args:?}: {instead:?}");
        }
    }

    #[test]
    fn wrong_command_lines_are_told_in_one_line() {
        for (args, want) in [
            (
                &["run", "--bogus", "i"][..],
                "unexpected argument '--bogus' found; see `mvm run --help`",
            ),
            (
                &["image", "rm"],
                "the following required arguments were not provided: <IMAGES>; see `mvm image rm --help`",
            ),
            (&["qqq"], "unrecognized subcommand 'qqq'; see `mvm --help`"),
            (
                &["run", "--engine", "tcg", "i"],
                "invalid value 'tcg' for '--engine <ENGINE>' [possible values: auto, kvm, emu, \
                 emu:jit, emu:interp]; see `mvm run --help`",
            ),
        ] {
            let all = ["mvm"].iter().chain(args);
            let error = cli::Cli::try_parse_from(all).unwrap_err();
            let command = command_of(args.iter().map(Into::into));
            assert_eq!(one_line(&error.render().to_string(), &command), want);
        }
    }
}
