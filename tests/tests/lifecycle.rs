//! Containers that live beside the command that started them, and what is left after all ends.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use mvm_tests::{World, eventually};
use nix::sys::signal::{Signal, kill};

fn start(world: &World, name: &str, script: &str) {
    world.mvm(&["run", "-d", "--name", name, "busybox", "sh", "-c", script]).expect_code(0);
}

#[test]
fn exec_logs_stop_and_rm() {
    let world = World::small();
    start(world, "life", "trap 'echo bye; exit 7' TERM; echo started; while :; do sleep 0.1; done");
    eventually("the first line of its log", || world.mvm(&["logs", "life"]).out() == "started\n");
    let run = world
        .mvm_with(&["exec", "-i", "-e", "X=1", "life", "sh", "-c", "cat; echo $X; exit 9"], b"in ")
        .expect_code(9);
    assert_eq!(run.out(), "in 1\n");
    assert!(world.mvm(&["ps"]).out().contains("life"));
    world.mvm(&["run", "--name", "life", "busybox", "true"]).expect_code(125);
    world.mvm(&["stop", "life"]).expect_code(0);
    assert_eq!(world.mvm(&["wait", "life"]).expect_code(0).out(), "7\n");
    assert_eq!(world.mvm(&["logs", "life"]).out(), "started\nbye\n");
    world.mvm(&["rm", "life"]).expect_code(0);
    assert!(!world.mvm(&["ps", "-a"]).out().contains("life"));
}

#[test]
fn a_process_that_ignores_term_is_killed() {
    let world = World::small();
    start(world, "stubborn", "trap '' TERM; echo up; while :; do sleep 0.1; done");
    eventually("its log", || world.mvm(&["logs", "stubborn"]).out() == "up\n");
    world.mvm(&["stop", "-t", "1", "stubborn"]).expect_code(0);
    assert_eq!(world.mvm(&["wait", "stubborn"]).out(), "137\n");
    world.mvm(&["rm", "stubborn"]).expect_code(0);
}

#[test]
fn a_killed_monitor_is_seen_and_cleaned() {
    let world = World::small();
    start(world, "victim", "sleep 1000");
    world.kill_monitor("victim");
    eventually("the reason in ps", || {
        world.mvm(&["ps", "-a"]).out().contains("was ended by SIGKILL")
    });
    assert_eq!(world.mvm(&["wait", "victim"]).expect_code(0).out(), "125\n");
    world.mvm(&["rm", "victim"]).expect_code(0);
}

#[test]
fn a_killed_front_door_leaves_a_container_that_can_be_removed() {
    let world = World::small();
    let mut child = world
        .command(&["run", "--name", "orphan", "busybox", "sh", "-c", "echo up; sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("its log", || world.mvm(&["logs", "orphan"]).out() == "up\n");
    child.kill().unwrap();
    child.wait().unwrap();
    let list = world.mvm(&["ps"]).out();
    assert!(list.contains("orphan") && list.contains("was killed; `mvm rm -f orphan`"), "{list}");
    // It can still be worked with.
    let monitor = world.monitor("orphan");
    assert_eq!(world.mvm(&["exec", "orphan", "echo", "alive"]).expect_code(0).out(), "alive\n");
    world.mvm(&["rm", "orphan"]).expect_code(125);
    world.mvm(&["rm", "-f", "orphan"]).expect_code(0);
    assert!(!mvm_tests::is_running(monitor), "its machine is still there");
    assert!(!world.mvm(&["ps", "-a"]).out().contains("orphan"));
}

#[test]
fn a_container_whose_state_is_damaged_is_ended_before_it_is_removed() {
    let world = World::small();
    start(world, "odd", "sleep 1000");
    let monitor = world.monitor("odd");
    let id = world.mvm(&["ps", "-q"]).expect_code(0).out();
    fs::write(world.root().join("run/sandboxes").join(id.trim()).join("state.json"), "junk")
        .unwrap();
    let kept = world.mvm(&["rm", "odd"]).expect_code(125);
    assert!(kept.err().contains("state.json is damaged") && mvm_tests::is_running(monitor));
    world.mvm(&["rm", "-f", "odd"]).expect_code(0);
    assert!(!mvm_tests::is_running(monitor), "its machine is still there");
    assert_eq!(world.mvm(&["ps", "-aq"]).expect_code(0).out(), "");
}

#[test]
fn four_at_once() {
    let world = World::small();
    thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|i| {
                scope.spawn(move || world.sh("busybox", &format!("sleep 1; echo {i}; exit {i}")))
            })
            .collect();
        for (i, run) in runs.into_iter().enumerate() {
            let run = run.join().unwrap().expect_code(i32::try_from(i).unwrap());
            assert_eq!(run.out(), format!("{i}\n"));
        }
    });
}

/// Everything below the root directory, and the processes that run from it.
fn traces(world: &World) -> BTreeSet<String> {
    fn walk(dir: &Path, into: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            into.insert(entry.path().display().to_string());
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                walk(&entry.path(), into);
            }
        }
    }
    let mut all = BTreeSet::new();
    walk(world.root(), &mut all);
    let root = world.root().display().to_string();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    all.extend(mounts.lines().filter(|line| line.contains(&root)).map(str::to_owned));
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        // A process of this world has something of its open; one of a stranger cannot be read.
        let fds = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let mut files = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        if files.any(|file| file.starts_with(world.root())) {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            all.insert(format!("{} {line}", entry.path().display()));
        }
    }
    all
}

#[test]
fn many_runs_leave_nothing() {
    let world = World::with_images(&["busybox"]);
    world.sh("busybox", "true").expect_code(0);
    let (before, size) = (traces(&world), world.size());
    for i in 0..100 {
        match i % 4 {
            0 => world.sh("busybox", "true").expect_code(0),
            1 => world.sh("busybox", "exit 3").expect_code(3),
            2 => world.mvm(&["run", "--rm", "busybox", "no-such"]).expect_code(127),
            _ => world.mvm(&["run", "--rm", "--kernel", "/etc/passwd", "busybox"]).expect_code(125),
        };
    }
    let after = traces(&world);
    assert_eq!(world.size(), size, "the directories have grown");
    let new: Vec<_> = after.difference(&before).collect();
    assert!(new.is_empty(), "left over: {new:#?}");
}

#[test]
fn signals_and_the_end_that_they_bring() {
    let world = World::small();
    start(world, "sig", "trap 'echo usr' USR1; echo up; while :; do sleep 0.1; done");
    eventually("its log", || world.mvm(&["logs", "sig"]).out() == "up\n");
    world.mvm(&["kill", "-s", "USR1", "sig"]).expect_code(0);
    eventually("the signal", || world.mvm(&["logs", "sig"]).out() == "up\nusr\n");
    world.mvm(&["kill", "-s", "SIGBOGUS", "sig"]).expect_code(125);
    world.mvm(&["kill", "sig"]).expect_code(0);
    assert_eq!(world.mvm(&["wait", "sig"]).out(), "137\n");
    let late = world.mvm(&["kill", "sig"]).expect_code(125);
    assert!(late.err().contains("is exited"), "{}", late.err());
    world.mvm(&["stop", "sig"]).expect_code(0);
    assert!(world.mvm(&["ps", "-a"]).out().contains("Exited (137)"));
    world.mvm(&["rm", "sig"]).expect_code(0);
    let gone = world.mvm(&["rm", "sig"]).expect_code(125);
    assert!(gone.err().contains("no such container: sig"), "{}", gone.err());
}

#[test]
fn the_signal_that_stops_is_the_one_that_was_asked_for() {
    let world = World::small();
    let script = "trap 'echo quit; exit 9' QUIT; trap 'echo term' TERM; echo up; while :; do sleep 0.1; done";
    let line =
        ["run", "-d", "--name", "quit", "--stop-signal", "QUIT", "busybox", "sh", "-c", script];
    world.mvm(&line).expect_code(0);
    eventually("its log", || world.mvm(&["logs", "quit"]).out() == "up\n");
    world.mvm(&["stop", "quit"]).expect_code(0);
    assert_eq!(world.mvm(&["wait", "quit"]).out(), "9\n");
    assert_eq!(world.mvm(&["logs", "quit"]).out(), "up\nquit\n");
    world.mvm(&["rm", "quit"]).expect_code(0);
}

#[test]
fn a_container_that_stands_still_goes_on_where_it_was() {
    let world = World::small();
    start(world, "still", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done");
    eventually("its log", || world.mvm(&["logs", "still"]).out().lines().count() > 3);
    world.mvm(&["pause", "still"]).expect_code(0);
    assert!(world.mvm(&["ps"]).out().contains("(Paused)"));
    world.mvm(&["exec", "still", "true"]).expect_code(125);
    world.mvm(&["stats", "still"]).expect_code(0);
    // What was under way when it was stopped still comes, and then nothing more: it would write ten lines in this time.
    let lines = || world.mvm(&["logs", "still"]).out().lines().count();
    let mut before = lines();
    eventually("that it stands still", || {
        thread::sleep(Duration::from_millis(500));
        let (earlier, now) = (before, lines());
        before = now;
        earlier == now
    });
    world.mvm(&["unpause", "still"]).expect_code(0);
    eventually("that it goes on", || lines() > before);
    world.mvm(&["pause", "still"]).expect_code(0);
    world.mvm(&["rm", "-f", "still"]).expect_code(0);
}

#[test]
fn a_background_container_with_rm_leaves_nothing_and_one_that_fails_says_why() {
    let world = World::small();
    world.mvm(&["run", "-d", "--rm", "--name", "brief", "busybox", "true"]).expect_code(0);
    eventually("its removal", || !world.mvm(&["ps", "-a"]).out().contains("brief"));
    let failed =
        world.mvm(&["run", "-d", "--name", "never", "busybox", "no-such"]).expect_code(127);
    assert!(failed.err().contains("no-such") && failed.out().is_empty(), "{}", failed.err());
    assert!(!world.mvm(&["ps", "-a"]).out().contains("never"));
}

#[test]
fn a_background_container_whose_start_is_interrupted_leaves_nothing() {
    let world = World::small();
    let mut child = world
        .command(&["run", "-d", "--name", "unheard", "busybox", "sleep", "1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the container", || world.mvm(&["ps", "-aq"]).out().lines().count() == 1);
    child.kill().unwrap();
    child.wait().unwrap();
    // It may have become known just before, and runs then.
    eventually("its end", || {
        let list = world.mvm(&["ps", "-a"]).out();
        !list.contains("unheard") || list.contains(" Up ")
    });
    world.mvm(&["rm", "-f", "unheard"]);
}

#[test]
fn logs_follow_to_the_end() {
    let world = World::small();
    start(world, "talker", "for i in 1 2 3 4 5; do echo $i; echo e$i >&2; sleep 0.2; done; exit 2");
    let follow = world.mvm(&["logs", "-f", "talker"]).expect_code(0);
    assert_eq!(
        (follow.out(), follow.err()),
        ("1\n2\n3\n4\n5\n".into(), "e1\ne2\ne3\ne4\ne5\n".into())
    );
    assert_eq!(world.mvm(&["logs", "talker"]).out(), follow.out());
    assert!(world.mvm(&["logs", "-t", "talker"]).out().starts_with("20"));
    world.mvm(&["rm", "talker"]).expect_code(0);
    // A container in the foreground has the same log.
    world.mvm(&["run", "--name", "front", "busybox", "echo", "shown"]).expect_code(0);
    assert_eq!(world.mvm(&["logs", "front"]).out(), "shown\n");
    let about = world.inspect("front");
    assert_eq!((about["status"].as_str(), about["exit_code"].as_i64()), (Some("exited"), Some(0)));
    world.mvm(&["rm", "front"]).expect_code(0);
}

#[test]
fn a_front_door_killed_while_the_machine_starts() {
    let world = World::small();
    let mut child = world
        .command(&["run", "--name", "early", "busybox", "sleep", "1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the container", || world.mvm(&["ps", "-q"]).out().lines().count() == 1);
    child.kill().unwrap();
    child.wait().unwrap();
    // It was starting or had just started: either is told, and either can be removed.
    let list = world.mvm(&["ps", "-a"]).out();
    assert!(list.contains("early") && list.contains("was killed"), "{list}");
    world.mvm(&["rm", "-f", "early"]).expect_code(0);
    assert_eq!(world.mvm(&["ps", "-aq"]).out(), "");
}

#[test]
fn both_killed() {
    let world = World::small();
    let mut child = world
        .command(&["run", "--rm", "--name", "both", "busybox", "sh", "-c", "echo up; sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("its log", || world.mvm(&["logs", "both"]).out() == "up\n");
    let monitor = world.monitor("both");
    child.kill().unwrap();
    kill(monitor, Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    eventually("both reasons", || world.mvm(&["ps", "-a"]).out().contains("were killed"));
    world.mvm(&["rm", "both"]).expect_code(0);
}

#[test]
fn what_a_container_costs_is_told() {
    let world = World::small();
    start(world, "cost", "sleep 1000");
    let table = world.mvm(&["stats"]).expect_code(0).out();
    assert!(table.contains("OVERHEAD") && table.contains("cost"), "{table}");
    let json = world.mvm(&["stats", "--format", "json", "cost"]).expect_code(0).out();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    for figure in ["/host/resident", "/host/overhead", "/host/guest_resident", "/guest/pids"] {
        assert!(json.pointer(figure).unwrap().as_u64().unwrap() > 0, "{figure} in {json}");
    }
    assert!(!json["engine"].as_object().unwrap().is_empty());
    world.mvm(&["rm", "-f", "cost"]).expect_code(0);
}
