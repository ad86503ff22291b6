use clap::CommandFactory;

use super::*;

fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
    let all = ["mvm", "run"].iter().chain(args);
    match Cli::try_parse_from(all)?.command {
        Command::Run(run) => Ok(*run),
        other => panic!("{other:?}"),
    }
}

#[test]
fn definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn short_flags_combine() {
    let args = run(&["-it", "--rm", "busybox", "sh"]).unwrap();
    assert!(args.interactive && args.tty && args.rm && !args.detach);
    assert_eq!((args.image(), args.command()), ("busybox", &["sh".to_owned()][..]));
}

#[test]
fn everything_after_the_image_is_the_command() {
    let args = run(&["busybox", "--rm", "-it", "--", "ls", "-la"]).unwrap();
    assert!(!args.rm && !args.interactive);
    assert_eq!(args.command(), ["--rm", "-it", "--", "ls", "-la"]);
    let args = run(&["-i", "busybox", "sh", "-c", "exit 3"]).unwrap();
    assert_eq!(args.command(), ["sh", "-c", "exit 3"]);
}

#[test]
fn values_come_attached_or_apart() {
    let args =
        run(&["-eA=1", "-e", "B=2", "--env=C=3", "--env", "D", "-u0:0", "-w/x", "-m64m", "i"])
            .unwrap();
    assert_eq!(args.env, ["A=1", "B=2", "C=3", "D"]);
    assert_eq!(args.user.as_deref(), Some("0:0"));
    assert_eq!(args.workdir.as_deref(), Some("/x"));
    assert_eq!(args.memory.as_deref(), Some("64m"));
}

#[test]
fn timings_take_an_optional_format() {
    assert_eq!(run(&["i"]).unwrap().timings, None);
    let args = run(&["--timings", "i"]).unwrap();
    assert_eq!((args.timings, args.image()), (Some(TimingsFormat::Text), "i"));
    assert_eq!(run(&["--timings=json", "i"]).unwrap().timings, Some(TimingsFormat::Json));
}

#[test]
fn empty_entrypoint_is_kept() {
    assert_eq!(run(&["--entrypoint", "", "i", "x"]).unwrap().entrypoint.as_deref(), Some(""));
}

#[test]
fn missing_image_and_unknown_flags_are_refused() {
    assert!(run(&[]).is_err());
    assert!(run(&["--rm"]).is_err());
    assert!(run(&["--bogus", "i"]).is_err());
    assert!(run(&["--engine", "tcg", "i"]).is_err());
}

#[test]
fn global_options_stand_before_or_after_the_subcommand() {
    for args in [["mvm", "--root", "/r", "ps"], ["mvm", "ps", "--root", "/r"]] {
        let cli = Cli::try_parse_from(args).unwrap();
        assert_eq!(cli.root.as_deref(), Some(std::path::Path::new("/r")));
    }
}

#[test]
fn exec_needs_a_command() {
    assert!(Cli::try_parse_from(["mvm", "exec", "c"]).is_err());
    let cli = Cli::try_parse_from(["mvm", "exec", "-it", "c", "sh", "-l"]).unwrap();
    let Command::Exec(exec) = cli.command else { panic!() };
    assert_eq!((exec.container(), exec.command().len()), ("c", 2));
}
