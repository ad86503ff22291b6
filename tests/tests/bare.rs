//! Machines without agent: `mvm run --unikernel KIND --kernel FILE`.

use std::process::{Command, Stdio};
use std::time::Duration;

use mvm_tests::unikernel::{self, kernel, kvm_works};
use mvm_tests::{Finished, Running, Terminal, World, engine, eventually};
use nix::sys::signal::Signal;

/// The command that runs our unikernel with `words`. Its engine is named, so that nothing is said of the choice.
fn command(flags: &[&str], words: &[&str]) -> Command {
    unikernel::command(engine(), flags, words)
}

fn run(flags: &[&str], words: &[&str]) -> Finished {
    mvm_tests::run_with(command(flags, words), b"", Duration::from_secs(120))
}

#[test]
fn output_is_what_it_prints_and_nothing_else() {
    let hello = run(&["--rm"], &["hello", "--word=x"]).expect_code(0);
    assert!(hello.out().starts_with("Hello from a unikernel!\n"), "{}", hello.out());
    assert!(hello.out().contains("hello --word=x"), "{}", hello.out());
    assert_eq!(hello.err(), "");
}

#[test]
fn on_a_terminal_all_keys_are_the_guests() {
    let mut terminal = Terminal::start(&command(&["--rm", "-it"], &["echo"]), 80, 24);
    terminal.wait_for("until Ctrl-D");
    // Its own terminal would make a signal of the first, and keep the rest to itself until a line ends.
    terminal.press("\x03ab");
    terminal.wait_for("\x03ab");
    assert!(terminal.is_raw());
    terminal.press("\x04");
    assert_eq!(terminal.wait(), 0);
    assert!(terminal.is_as_before());

    let mut terminal = Terminal::start(&command(&["--rm", "-it"], &["echo"]), 80, 24);
    terminal.wait_for("until Ctrl-D");
    terminal.signal(Signal::SIGTERM);
    assert_eq!(terminal.wait(), 143);
    assert!(terminal.is_as_before());
}

#[test]
fn ends_are_exit_codes() {
    run(&["--rm"], &["hello", "exit=3"]).expect_code(7);
    let halted = run(&["--rm"], &["halt"]).expect_code(134);
    assert!(halted.err().contains("halted all its processors"), "{}", halted.err());
    let crashed = run(&["--rm"], &["fault"]).expect_code(139);
    assert!(crashed.err().contains("triple fault"), "{}", crashed.err());
}

#[test]
fn little_memory_and_more_processors() {
    run(&["--rm", "--memory", "16m"], &["hello"]).expect_code(0);
    let refused = run(&["--rm", "--memory", "1m"], &["hello"]).expect_code(125);
    assert!(refused.err().contains("--memory 1m"), "{}", refused.err());
    let two = run(&["--rm", "--cpus", "2"], &["hello"]).expect_code(0);
    assert!(two.out().contains("processors: 2"), "{}", two.out());
}

#[test]
fn it_is_stopped_at_once_and_logged() {
    let world = World::small();
    let id = run(&["-d", "--name", "bare-stop"], &["spin"]).expect_code(0);
    assert_eq!(id.out().trim().len(), 12);
    eventually("its log", || world.mvm(&["logs", "bare-stop"]).out().starts_with("spin"));
    world.mvm(&["stats", "bare-stop"]).expect_code(0);
    let refused = world.mvm(&["exec", "bare-stop", "true"]).expect_code(125);
    assert!(refused.err().contains("without mvm's agent"), "{}", refused.err());
    world.mvm(&["kill", "-s", "USR1", "bare-stop"]).expect_code(125);
    world.mvm(&["pause", "bare-stop"]).expect_code(0);
    world.mvm(&["unpause", "bare-stop"]).expect_code(0);
    world.mvm(&["stop", "bare-stop"]).expect_code(0);
    assert_eq!(world.mvm(&["wait", "bare-stop"]).out(), "143\n");
    world.mvm(&["rm", "bare-stop"]).expect_code(0);
}

#[test]
fn interrupts_end_it() {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut running = Running::start(command(&["--rm"], &["spin"]));
        running.wait_for("spin");
        running.signal(signal);
        running.finish().expect_code(code);
    }
}

#[test]
fn a_killed_monitor_and_a_killed_front_door() {
    let world = World::small();
    run(&["-d", "--name", "bare-victim"], &["spin"]).expect_code(0);
    world.kill_monitor("bare-victim");
    assert_eq!(world.mvm(&["wait", "bare-victim"]).out(), "137\n");
    world.mvm(&["rm", "bare-victim"]).expect_code(0);

    let mut child = command(&["--name", "bare-orphan"], &["spin"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("its log", || world.mvm(&["logs", "bare-orphan"]).out().starts_with("spin"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(world.mvm(&["ps"]).out().contains("unattended"));
    world.mvm(&["rm", "-f", "bare-orphan"]).expect_code(0);
    assert!(!world.mvm(&["ps", "-a"]).out().contains("bare-orphan"));
}

#[test]
fn what_cannot_be_is_one_line_and_leaves_nothing() {
    let world = World::with_images(&[]);
    let kernel = kernel();
    let kernel = kernel.to_str().expect("a UTF-8 path");
    // What is measured of the host stays.
    let first = ["run", "--rm", "--engine", engine(), "--unikernel", "rust", "--kernel", kernel];
    world.mvm(&first).expect_code(0);
    let before = world.size();
    for (args, want) in [
        (&["-t", "--unikernel", "rust", "--kernel", kernel][..], "--tty cannot hold"),
        (&["-it", "--unikernel", "rust", "--kernel", kernel], "not a TTY"),
        (&["-i", "--unikernel", "hvt", "--kernel", kernel], "--interactive cannot hold"),
        (&["--unikernel", "rust", "--kernel", "/etc/passwd"], "not a kernel"),
        (&["--unikernel", "rust", "--kernel", "/no/such"], "/no/such"),
        (&["--unikernel", "hvt", "--kernel", kernel], "hvt"),
        (&["--unikernel", "linux", "--kernel", kernel, "--disk", "/no/disk"], "/no/disk"),
        (&["--unikernel", "rust"], "--kernel"),
        (&["--unikernel", "dos", "--kernel", kernel], "dos"),
    ] {
        let run = world.mvm(&[&["run", "--engine", engine()], args].concat()).expect_code(125);
        assert!(run.err().contains(want), "{args:?}: {}", run.err());
        assert_eq!(run.out(), "");
    }
    assert_eq!(world.mvm(&["ps", "-a", "-q"]).out(), "");
    assert_eq!(world.size(), before);
}

#[test]
fn a_reader_that_goes_away_ends_it() {
    let mut child = command(&["--rm"], &["hello"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
fn what_is_typed_reaches_its_serial_port() {
    // Far more than the port holds at a time.
    let typed = "all that is typed, ".repeat(1000);
    let input = format!("{typed}\u{4}and nothing after");
    let echo = mvm_tests::run_with(
        command(&["--rm", "-i"], &["echo"]),
        input.as_bytes(),
        Duration::from_secs(120),
    );
    let echo = echo.expect_code(0);
    assert!(echo.out() == format!("echo: until Ctrl-D\n{typed}"), "{} bytes", echo.out().len());
    assert_eq!(echo.err(), "");
    // The end of the input is none of the guest's, and the guest's end does not wait for it.
    let hello = command(&["--rm", "-i"], &["hello"]);
    mvm_tests::run_with(hello, &[b'x'; 1 << 20], Duration::from_secs(120)).expect_code(0);
    let mut talk = command(&["--rm", "-i"], &["hello"]);
    let (input, _open) = std::io::pipe().expect("a pipe");
    let talk = talk.stdin(input).output().expect("mvm");
    assert!(talk.status.success(), "{talk:?}");
}

#[test]
fn a_guest_that_has_no_port_cannot_be_spoken_to() {
    let world = World::small();
    let kernel = world.root().join("hello.hvt");
    let elf =
        mvm_vmm::testing::ElfBuilder::elf64(0x10_0000).load(0x10_0000, &[0xfa, 0xf4]).solo5(1, &[]);
    std::fs::write(&kernel, elf.build()).expect("a kernel");
    let kernel = kernel.to_str().expect("UTF-8");
    // By its kind, and by its file.
    for kind in ["hvt", "rust"] {
        let line =
            ["run", "--rm", "--engine", "emu", "-i", "--unikernel", kind, "--kernel", kernel];
        let refused = world.mvm(&line).expect_code(125);
        let said = refused.err();
        assert!(
            said.contains("no call that reads") || said.contains("nothing to type at"),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn an_image_of_it_runs_without_a_flag() {
    let world = World::small();
    let image = world.image_file("hello-unikernel");
    let image = image.to_str().expect("UTF-8");
    let run =
        |args: &[&str]| world.mvm(&[&["run", "--rm", "--engine", "emu", image], args].concat());
    let hello = run(&[]).expect_code(0);
    assert!(hello.out().starts_with("Hello from a unikernel!\n"), "{}", hello.out());
    assert_eq!(run(&["timer=1", "exit=2"]).expect_code(5).out(), "timer: 1 ticks\n");
}

#[test]
fn multiboot_kernels_get_their_name_and_modules() {
    let world = World::small();
    // The second module's content is what it would print; it says how it was booted.
    let module = world.root().join("env");
    std::fs::write(&module, "A=b").expect("a module");
    let module = module.to_str().expect("UTF-8");
    let kernel = kernel();
    let kernel = kernel.to_str().expect("UTF-8");
    let line = [
        "run",
        "--rm",
        "--engine",
        "emu",
        "--unikernel",
        "multiboot",
        "--kernel",
        kernel,
        "--initrd",
    ];
    let list = format!("{module} x=1,{module}");
    let hello = world.mvm(&[&line[..], &[&list, "hello", "y"]].concat()).expect_code(0);
    let booted = "booted by multiboot: hello-unikernel.elf hello y\n";
    assert!(hello.out().contains(booted), "{}", hello.out());
    let missing = format!("{module},/no/such/module");
    let refused = world.mvm(&[&line[..], &[&missing]].concat()).expect_code(125);
    assert!(refused.err().contains("/no/such/module"), "{}", refused.err());
}

#[test]
fn ten_thousand_doorbells_and_interrupts_are_no_exits_in_stats() {
    if !kvm_works() {
        return;
    }
    let world = World::small();
    let kernel = kernel();
    let kernel = kernel.to_str().expect("UTF-8");
    // Numbers of the same length: as many bytes to print.
    let exits = ["10000", "20000"].map(|times| {
        let name = format!("doorbells-{times}");
        let word = format!("doorbell={times}");
        let fixed = ["run", "-d", "--engine", "kvm", "--unikernel", "rust", "--kernel", kernel];
        world.mvm(&[&fixed[..], &["--name", &name, &word, "spin"]].concat()).expect_code(0);
        let line = format!("doorbell: {times} requests, {times} interrupts\nspin\n");
        eventually("its last word", || world.mvm(&["logs", &name]).out() == line);
        let stats = world.mvm(&["stats", "--format", "json", &name]).expect_code(0).out();
        world.mvm(&["rm", "-f", &name]).expect_code(0);
        let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
        assert_eq!(stats["devices"]["mvm-rng.interrupts"].to_string(), times);
        stats["engine"]["vcpu0.exits"].as_u64().expect("exits")
    });
    assert_eq!(exits[0], exits[1], "what a doorbell or an interrupt costs");
}
