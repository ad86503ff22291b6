//! Terminals: keys, sizes, signals, and the user's own terminal as it was on every way out.

use std::thread;
use std::time::{Duration, Instant};

use mvm_tests::{Terminal, World, engine};
use nix::sys::signal::Signal;

const PROMPT: &str = "/ # ";

/// `mvm run -it` of a shell that has shown its prompt, on a terminal of 100 columns and 30 rows.
fn shell(world: &World, flags: &[&str]) -> Terminal {
    let mut args = vec!["run", "-it", "--rm", "--engine", engine()];
    args.extend(flags);
    args.extend(["busybox", "sh"]);
    let mut terminal = Terminal::start(&world.command(&args), 100, 30);
    terminal.wait_for(PROMPT);
    terminal
}

#[track_caller]
fn leaves_nothing(world: &World, terminal: &Terminal) {
    assert!(terminal.is_as_before(), "the terminal is not as it was:\n{}", terminal.screen());
    assert_eq!(world.mvm(&["ps", "-aq"]).expect_code(0).out(), "");
}

#[test]
fn the_guest_has_a_terminal_of_the_same_size_and_hears_of_changes() {
    let world = World::small();
    let mut terminal = shell(world, &[]);
    assert!(terminal.is_raw());
    terminal.press("tty; stty size; echo $TERM\r");
    terminal.wait_for("/dev/pts/0\r\n30 100\r\nxterm\r\n");
    terminal.resize(132, 43);
    // The new size takes its way through host and guest.
    terminal.press("until [ \"$(stty size)\" = '43 132' ]; do sleep 0.1; done; echo res''ized\r");
    terminal.wait_for("resized");
    terminal.press("exit 7\r");
    assert_eq!(terminal.wait(), 7);
    leaves_nothing(world, &terminal);
}

/// A process that tells which signals reach it, and ends with code 5 at the line `q`.
const TELLER: &str = "for s in INT QUIT TSTP TERM HUP USR1 WINCH; do trap \"echo got-$s\" $s; done; \
                      echo ready; while :; do x=; read -t 1 x; [ \"$x\" = q ] && exit 5; done";

fn teller(world: &World, flags: &[&str]) -> Terminal {
    let mut args = vec!["run", "-it", "--rm", "--engine", engine()];
    args.extend(flags);
    args.extend(["busybox", "sh", "-c", TELLER]);
    let mut terminal = Terminal::start(&world.command(&args), 80, 24);
    terminal.wait_for("ready");
    terminal
}

#[test]
fn control_keys_are_the_guests() {
    let world = World::small();
    let mut terminal = teller(world, &[]);
    for (key, says) in [("\x03", "got-INT"), ("\x1c", "got-QUIT"), ("\x1a", "got-TSTP")] {
        terminal.press(key);
        terminal.wait_for(says);
    }
    terminal.press("q\r");
    assert_eq!(terminal.wait(), 5);
    leaves_nothing(world, &terminal);
}

#[test]
fn signals_to_mvm_reach_the_process_and_the_third_request_to_end_is_not_passed_on() {
    let world = World::small();
    let mut terminal = teller(world, &[]);
    terminal.signal(Signal::SIGUSR1);
    terminal.wait_for("got-USR1");
    for _ in 0..2 {
        terminal.signal(Signal::SIGTERM);
        terminal.wait_for("got-TERM");
        assert!(terminal.is_raw());
    }
    terminal.signal(Signal::SIGTERM);
    assert_eq!(terminal.wait(), 143);
    leaves_nothing(world, &terminal);
}

#[test]
fn ctrl_c_ends_a_program_that_does_not_catch_it() {
    let world = World::small();
    let command = world.command(&[
        "run",
        "-it",
        "--rm",
        "--init",
        "busybox",
        "sh",
        "-c",
        "echo up; sleep 1000",
    ]);
    let mut terminal = Terminal::start(&command, 80, 24);
    terminal.wait_for("up");
    terminal.press("\x03");
    assert_eq!(terminal.wait(), 130);
    leaves_nothing(world, &terminal);
}

#[test]
fn a_killed_monitor_gives_the_terminal_back_and_says_so() {
    let world = World::small();
    let mut terminal = teller(world, &["--name", "lost"]);
    world.kill_monitor("lost");
    assert_eq!(terminal.wait(), 125);
    terminal.wait_for("the machine ended");
    leaves_nothing(world, &terminal);
}

#[test]
fn a_command_that_is_not_there_gives_the_terminal_back() {
    let world = World::small();
    let command = world.command(&["run", "-it", "--rm", "busybox", "no-such-command"]);
    let mut terminal = Terminal::start(&command, 80, 24);
    assert_eq!(terminal.wait(), 127);
    // On a terminal that is itself again lines end as they should.
    terminal.wait_for("no-such-command");
    leaves_nothing(world, &terminal);
}

#[test]
fn ctrl_c_while_the_machine_starts_ends_it() {
    let world = World::small();
    // A guest that is up before we can press the key ends by it as well: `--init` sees to that.
    let command = world.command(&["run", "-it", "--rm", "--init", "busybox", "sleep", "1000"]);
    let mut terminal = Terminal::start(&command, 80, 24);
    wait_for_container(world);
    terminal.press("\x03");
    assert_eq!(terminal.wait(), 130);
    leaves_nothing(world, &terminal);
}

#[test]
fn a_window_that_changes_while_the_machine_starts() {
    let world = World::small();
    let command = world.command(&[
        "run",
        "-it",
        "--rm",
        "--engine",
        engine(),
        "busybox",
        "sh",
        "-c",
        "until [ \"$(stty size)\" = '33 99' ]; do sleep 0.1; done; echo there",
    ]);
    let mut terminal = Terminal::start(&command, 80, 24);
    wait_for_container(world);
    terminal.resize(99, 33);
    assert_eq!(terminal.wait(), 0);
    terminal.wait_for("there");
    leaves_nothing(world, &terminal);
}

/// Waits until there is a container, whether or not its machine is up.
#[track_caller]
fn wait_for_container(world: &World) {
    let start = Instant::now();
    while world.mvm(&["ps", "-q"]).out().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never started");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_closed_window_ends_the_container() {
    let world = World::small();
    let mut terminal = shell(world, &[]);
    terminal.hang_up();
    terminal.wait();
    assert_eq!(world.mvm(&["ps", "-aq"]).expect_code(0).out(), "");
}

#[test]
fn exec_has_a_terminal_of_its_own() {
    let world = World::small();
    world.mvm(&["run", "-d", "--rm", "--name", "host", "busybox", "sleep", "1000"]).expect_code(0);
    let mut terminal = Terminal::start(&world.command(&["exec", "-it", "host", "sh"]), 90, 20);
    terminal.wait_for(PROMPT);
    assert!(terminal.is_raw());
    terminal.press("stty size; echo $TERM; exit 3\r");
    terminal.wait_for("20 90\r\nxterm\r\n");
    assert_eq!(terminal.wait(), 3);
    assert!(terminal.is_as_before());
    world.mvm(&["rm", "-f", "host"]).expect_code(0);
}

#[test]
fn without_i_the_terminal_is_only_written_to() {
    let world = World::small();
    let command = world.command(&["run", "-t", "--rm", "busybox", "sh", "-c", "tty; stty size"]);
    let mut terminal = Terminal::start(&command, 70, 21);
    assert_eq!(terminal.wait(), 0);
    // As with docker it is not raw then, and adds carriage returns of its own.
    terminal.wait_for("/dev/pts/0\r\r\n21 70\r\r\n");
    leaves_nothing(world, &terminal);
}
