//! The reference of the command line as Markdown, made from the same definitions as `--help`.

use std::fmt::Write;

use clap::{Arg, ArgAction, Command, CommandFactory};

use crate::cli::Cli;

/// The whole of `docs/cli.md`.
pub fn reference() -> String {
    let mut root = Cli::command();
    root.build();
    let mut text = String::from(
        "# The command line\n\nThis page is made from the program's own help by `mvm gen-docs`; a \
         test compares the two.\n\n",
    );
    describe(&mut text, &root, "mvm", 2);
    text
}

fn describe(text: &mut String, command: &Command, path: &str, level: usize) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{} `{path}`\n", "#".repeat(level.min(4)));
    let about = command.get_long_about().or(command.get_about());
    if let Some(about) = about {
        let _ = writeln!(text, "{about}\n");
    }
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim();
    let _ = writeln!(text, "```text\n{usage}\n```\n");
    options(text, command, path == "mvm");
    if let Some(after) = command.get_after_help() {
        let _ = writeln!(text, "```text\n{after}\n```\n");
    }
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
        describe(text, sub, &format!("{path} {}", sub.get_name()), level + 1);
    }
}

fn options(text: &mut String, command: &Command, root: bool) {
    let shown: Vec<&Arg> = command
        .get_arguments()
        .filter(|a| !a.is_hide_set() && !matches!(a.get_id().as_str(), "help" | "version"))
        .filter(|a| root || !a.is_global_set())
        .collect();
    if shown.is_empty() {
        return;
    }
    text.push_str("| Option | Meaning |\n|---|---|\n");
    for arg in shown {
        let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string);
        let mut help = help.unwrap_or_default().replace('\n', " ");
        let values: Vec<String> = arg
            .get_possible_values()
            .iter()
            .filter(|v| !v.is_hide_set())
            .map(|v| match v.get_help() {
                Some(help) => format!("`{}` ({help})", v.get_name()),
                None => format!("`{}`", v.get_name()),
            })
            .collect();
        let takes_value = !matches!(arg.get_action(), ArgAction::SetTrue);
        if takes_value && !values.is_empty() {
            let _ = write!(help, ": {}", values.join(", "));
        }
        if let [default] = arg.get_default_values()
            && takes_value
        {
            let _ = write!(help, " [default: {}]", default.to_string_lossy());
        }
        let _ = writeln!(text, "| `{}` | {} |", synopsis(arg), help.replace('|', "\\|"));
    }
    text.push('\n');
}

fn synopsis(arg: &Arg) -> String {
    let names: Vec<String> = arg
        .get_short()
        .map(|s| format!("-{s}"))
        .into_iter()
        .chain(arg.get_long().map(|l| format!("--{l}")))
        .collect();
    let takes_value = !matches!(arg.get_action(), ArgAction::SetTrue);
    let values: Vec<String> =
        arg.get_value_names().into_iter().flatten().map(ToString::to_string).collect();
    match (names.is_empty(), takes_value) {
        (true, _) => values.join(" "),
        (false, false) => names.join("`, `"),
        (false, true) => format!("{} {}", names.join("`, `"), values.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_reference_is_the_programs_own() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == reference(),
            "docs/cli.md differs from the program's help: run `mvm gen-docs > docs/cli.md`"
        );
    }
}
