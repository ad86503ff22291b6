use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::backend::mock::{Mock, PID};

struct Recorder(Mutex<Sender<Event>>);

impl Sink for Recorder {
    fn publish(&self, event: Event) {
        // Fails only when the test is over.
        let _ = self.0.lock().unwrap().send(event);
    }
}

struct Bench {
    tasks: Arc<Tasks>,
    mock: Arc<Mock>,
    events: Receiver<Event>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let (tell, events) = channel();
        let mock = Arc::new(Mock::default());
        let recorder = Arc::new(Recorder(Mutex::new(tell)));
        let tasks = Arc::new(Tasks::new("ns", Arc::<Mock>::clone(&mock), recorder));
        Self { tasks, mock, events, dir: tempfile::tempdir().unwrap() }
    }

    fn create(&self, id: &str) -> Result<u32> {
        self.create_with(id, Paths::default())
    }

    fn create_with(&self, id: &str, paths: Paths) -> Result<u32> {
        let new = NewContainer {
            id: id.into(),
            bundle: "/bundle".into(),
            rootfs: Vec::new(),
            terminal: paths.terminal,
        };
        self.tasks.create(&new, paths)
    }

    /// A container that runs, of which all that was told has been heard.
    fn running() -> Self {
        let bench = Self::new();
        bench.create("c").unwrap();
        bench.tasks.start("c", "").unwrap();
        bench.told(&["create c", "start c"]);
        bench
    }

    fn exec(&self, exec: &str) -> Result<()> {
        self.tasks.exec("c", exec, oci_spec::runtime::Process::default(), Paths::default())
    }

    fn exec_running(&self, exec: &str) {
        self.exec(exec).unwrap();
        self.tasks.start("c", exec).unwrap();
        self.told(&[&format!("added c/{exec}"), &format!("exec started c/{exec}")]);
    }

    /// The next events are these. There is no deadline: an event that never comes is a hang.
    #[track_caller]
    fn told(&self, want: &[&str]) {
        for want in want {
            assert_eq!(short(&self.events.recv().unwrap()), *want);
        }
    }

    #[track_caller]
    fn told_nothing(&self) {
        assert_eq!(self.events.try_iter().map(|e| short(&e)).collect::<Vec<_>>(), [""; 0]);
    }
}

fn short(event: &Event) -> String {
    match event {
        Event::Create(e) => format!("create {}", e.container_id),
        Event::Start(e) => format!("start {}", e.container_id),
        Event::Exit(e) => format!("exit {}/{} {}", e.container_id, e.id, e.exit_status),
        Event::Oom(e) => format!("oom {}", e.container_id),
        Event::Delete(e) => format!("delete {} {}", e.container_id, e.exit_status),
        Event::ExecAdded(e) => format!("added {}/{}", e.container_id, e.exec_id),
        Event::ExecStarted(e) => format!("exec started {}/{}", e.container_id, e.exec_id),
        Event::Paused(e) => format!("paused {}", e.container_id),
        Event::Resumed(e) => format!("resumed {}", e.container_id),
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, kind: &str) {
    let error = result.unwrap_err();
    let found = match error {
        Error::NotFound(_) => "not found",
        Error::AlreadyExists(_) => "exists",
        Error::FailedPrecondition(_) => "precondition",
        Error::InvalidArgument(_) => "invalid",
        Error::Unimplemented(_) => "unimplemented",
        Error::Failed { .. } => "failed",
    };
    assert_eq!(found, kind, "{error}");
}

#[test]
fn a_whole_life_is_told_in_order() {
    let bench = Bench::new();
    assert_eq!(bench.create("c").unwrap(), PID);
    assert_eq!(bench.tasks.start("c", "").unwrap(), PID);
    bench.mock.end("c", "", Exit::now(7));
    assert_eq!(bench.tasks.wait("c", "").unwrap().status, 7);
    let deleted = bench.tasks.delete("c", "").unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (PID, 7));
    bench.told(&["create c", "start c", "exit c/c 7", "delete c 7"]);
    bench.told_nothing();
    assert!(bench.tasks.is_empty());
    assert_eq!(bench.mock.calls(), ["create c", "start c", "delete c"]);
    refused(bench.tasks.wait("c", ""), "not found");
}

#[test]
fn what_is_not_there_is_not_found() {
    let bench = Bench::new();
    refused(bench.tasks.start("c", ""), "not found");
    refused(bench.tasks.delete("c", ""), "not found");
    refused(bench.tasks.kill("c", "", 9, false), "not found");
    refused(bench.tasks.pause("c"), "not found");
    refused(bench.tasks.resume("c"), "not found");
    refused(bench.tasks.stats("c"), "not found");
    refused(bench.tasks.processes("c"), "not found");
    refused(bench.tasks.update("c", b"{}"), "not found");
    refused(bench.tasks.resize("c", "", 1, 1), "not found");
    refused(bench.tasks.close_stdin("c", ""), "not found");
    refused(bench.exec("e"), "not found");
    let bench = Bench::running();
    refused(bench.tasks.start("c", "e"), "not found");
    refused(bench.tasks.wait("c", "e"), "not found");
    refused(bench.tasks.kill("c", "e", 9, false), "not found");
}

#[test]
fn ids_are_taken_once() {
    let bench = Bench::running();
    refused(bench.create("c"), "exists");
    bench.exec("e").unwrap();
    refused(bench.exec("e"), "exists");
    refused(bench.exec(""), "invalid");
}

#[test]
fn create_that_fails_leaves_nothing() {
    let bench = Bench::new();
    bench.mock.break_call("create", Error::failed("no root"));
    refused(bench.create("c"), "failed");
    bench.told_nothing();
    assert!(bench.tasks.is_empty());
    let missing = Paths { stdout: "/no/such/fifo".into(), ..Paths::default() };
    refused(bench.create_with("c", missing), "failed");
    assert!(bench.tasks.is_empty());
}

#[test]
fn start_that_fails_is_an_end_with_the_exit_status() {
    let bench = Bench::new();
    bench.create("c").unwrap();
    let code = 127;
    bench.mock.break_call("start", Error::Failed { message: "no such program".into(), code });
    refused(bench.tasks.start("c", ""), "failed");
    bench.told(&["create c", "exit c/c 127"]);
    refused(bench.tasks.start("c", ""), "precondition");
    assert_eq!(bench.tasks.delete("c", "").unwrap().exit.status, 127);
    bench.told(&["delete c 127"]);
}

#[test]
fn a_process_starts_once() {
    let bench = Bench::running();
    refused(bench.tasks.start("c", ""), "precondition");
    bench.mock.end("c", "", Exit::now(0));
    bench.told(&["exit c/c 0"]);
    refused(bench.tasks.start("c", ""), "precondition");
}

#[test]
fn what_runs_is_not_deleted() {
    let bench = Bench::running();
    bench.exec_running("e");
    refused(bench.tasks.delete("c", ""), "precondition");
    refused(bench.tasks.delete("c", "e"), "precondition");
    bench.told_nothing();
}

#[test]
fn a_container_that_never_ran_can_be_deleted() {
    let bench = Bench::new();
    bench.create("c").unwrap();
    assert_eq!(bench.tasks.delete("c", "").unwrap().exit.status, 137);
    bench.told(&["create c", "exit c/c 137", "delete c 137"]);
}

#[test]
fn a_signal_ends_what_was_not_started() {
    let bench = Bench::new();
    bench.create("c").unwrap();
    bench.tasks.kill("c", "", 0, false).unwrap();
    bench.told(&["create c"]);
    bench.tasks.kill("c", "", 15, false).unwrap();
    bench.told(&["exit c/c 143"]);
    refused(bench.tasks.start("c", ""), "precondition");
    refused(bench.tasks.kill("c", "", 9, false), "not found");
    assert_eq!(bench.mock.calls(), ["create c"]);
}

#[test]
fn a_signal_during_the_start_interrupts_it() {
    let bench = Bench::new();
    bench.create("c").unwrap();
    bench.mock.start_slowly();
    std::thread::scope(|scope| {
        let start = scope.spawn(|| bench.tasks.start("c", ""));
        bench.mock.wait_call("start c");
        bench.tasks.kill("c", "", 9, false).unwrap();
        refused(start.join().unwrap(), "failed");
    });
    bench.told(&["create c", "exit c/c 125"]);
}

#[test]
fn signals_reach_the_process_or_all() {
    let bench = Bench::running();
    bench.exec_running("e");
    bench.tasks.kill("c", "", 10, false).unwrap();
    bench.tasks.kill("c", "", 15, true).unwrap();
    bench.tasks.kill("c", "e", 12, false).unwrap();
    bench.tasks.kill("c", "", 0, false).unwrap();
    refused(bench.tasks.kill("c", "", 65, false), "invalid");
    refused(bench.tasks.kill("c", "", -1, false), "invalid");
    let calls = bench.mock.calls();
    assert_eq!(calls[3..], ["signal c  10", "signal_all c 15", "signal c e 12"]);
    bench.mock.break_call("signal", Error::FailedPrecondition("it has ended".into()));
    refused(bench.tasks.kill("c", "", 10, false), "not found");
}

#[test]
fn exec_has_a_life_of_its_own() {
    let bench = Bench::running();
    bench.exec("e").unwrap();
    refused(bench.tasks.kill("c", "e", 9, false), "precondition");
    assert_eq!(bench.tasks.start("c", "e").unwrap(), PID);
    bench.mock.end("c", "e", Exit::now(3));
    assert_eq!(bench.tasks.wait("c", "e").unwrap().status, 3);
    assert_eq!(bench.tasks.delete("c", "e").unwrap().exit.status, 3);
    bench.told(&["added c/e", "exec started c/e", "exit c/e 3"]);
    // Its deletion is told to nobody, as with runc.
    bench.told_nothing();
    bench.exec("e").unwrap();
    assert_eq!(bench.tasks.delete("c", "e").unwrap().exit.status, 0);
}

#[test]
fn exec_that_cannot_start_is_an_end() {
    let bench = Bench::running();
    bench.exec("e").unwrap();
    let code = 126;
    bench.mock.break_call("exec", Error::Failed { message: "not executable".into(), code });
    refused(bench.tasks.start("c", "e"), "failed");
    bench.told(&["added c/e", "exit c/e 126"]);
    assert_eq!(bench.tasks.delete("c", "e").unwrap().exit.status, 126);
}

#[test]
fn exec_needs_a_container_that_runs() {
    let bench = Bench::new();
    bench.create("c").unwrap();
    bench.exec("early").unwrap();
    refused(bench.tasks.start("c", "early"), "precondition");
    bench.tasks.start("c", "").unwrap();
    bench.tasks.start("c", "early").unwrap();
    bench.tasks.pause("c").unwrap();
    refused(bench.exec("e"), "precondition");
    bench.tasks.resume("c").unwrap();
    bench.exec("late").unwrap();
    bench.mock.end("c", "early", Exit::now(0));
    bench.mock.end("c", "", Exit::now(0));
    bench.tasks.wait("c", "").unwrap();
    refused(bench.exec("e"), "precondition");
    refused(bench.tasks.start("c", "late"), "precondition");
}

#[test]
fn execs_end_before_their_container() {
    let bench = Bench::running();
    bench.exec_running("a");
    bench.exec_running("b");
    bench.mock.end("c", "a", Exit::now(1));
    bench.told(&["exit c/a 1"]);
    bench.mock.end("c", "", Exit::now(0));
    bench.told(&["exit c/b 137", "exit c/c 0"]);
    bench.tasks.delete("c", "").unwrap();
    bench.told(&["delete c 0"]);
}

#[test]
fn out_of_memory_is_told_before_the_end() {
    let bench = Bench::running();
    bench.mock.end("c", "", Exit { oom_killed: true, ..Exit::now(137) });
    bench.told(&["oom c", "exit c/c 137"]);
}

#[test]
fn pause_and_resume_alternate() {
    let bench = Bench::new();
    bench.create("c").unwrap();
    refused(bench.tasks.pause("c"), "precondition");
    bench.tasks.start("c", "").unwrap();
    refused(bench.tasks.resume("c"), "precondition");
    bench.tasks.pause("c").unwrap();
    assert_eq!(bench.tasks.container("c").unwrap().word(), "paused");
    refused(bench.tasks.pause("c"), "precondition");
    bench.tasks.resume("c").unwrap();
    assert_eq!(bench.tasks.container("c").unwrap().word(), "running");
    bench.told(&["create c", "start c", "paused c", "resumed c"]);
    bench.mock.break_call("pause", Error::failed("no"));
    refused(bench.tasks.pause("c"), "failed");
    bench.told_nothing();
    assert_eq!(bench.tasks.container("c").unwrap().word(), "running");
}

#[test]
fn terminals_get_their_size_also_before_they_are_there() {
    let bench = Bench::new();
    let terminal = Paths { terminal: true, ..Paths::default() };
    bench.create_with("c", terminal).unwrap();
    bench.tasks.resize("c", "", 80, 25).unwrap();
    assert_eq!(bench.mock.calls(), ["create c"]);
    bench.tasks.start("c", "").unwrap();
    bench.tasks.resize("c", "", 100_000, 40).unwrap();
    assert_eq!(bench.mock.calls()[2..], ["resize c  80x25", "resize c  65535x40"]);
    bench.exec("e").unwrap();
    refused(bench.tasks.resize("c", "e", 1, 1), "precondition");
}

#[test]
fn figures_processes_and_limits_come_from_the_backend() {
    let bench = Bench::running();
    assert_eq!(bench.tasks.stats("c").unwrap().pids_current, 3);
    let pids: Vec<u32> = bench.tasks.processes("c").unwrap().iter().map(|p| p.pid).collect();
    assert_eq!(pids, [PID, 61]);
    bench.tasks.update("c", b"{}").unwrap();
    assert!(bench.mock.calls().contains(&"update c {}".to_owned()));
    bench.mock.end("c", "", Exit::now(0));
    bench.tasks.wait("c", "").unwrap();
    refused(bench.tasks.stats("c"), "not found");
    refused(bench.tasks.update("c", b"{}"), "precondition");
    assert!(bench.tasks.processes("c").unwrap().is_empty());
}

#[test]
fn output_goes_to_the_fifo_and_input_ends_with_close_io() {
    let bench = Bench::new();
    let path = |name: &str| {
        let path = bench.dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        path.display().to_string()
    };
    let paths =
        Paths { stdin: path("in"), stdout: path("out"), stderr: path("err"), ..Paths::default() };
    bench.create_with("c", paths.clone()).unwrap();
    bench.tasks.start("c", "").unwrap();
    let mut guest = bench.mock.ends("c", "");
    // Nobody reads yet: nothing is lost.
    guest.output.as_mut().unwrap().write_all(b"hello").unwrap();
    guest.error.as_mut().unwrap().write_all(b"oh").unwrap();
    let mut typed = std::fs::File::options().write(true).open(&paths.stdin).unwrap();
    typed.write_all(b"first").unwrap();
    drop(typed);
    // Another client comes back to it: the input has not ended.
    let mut typed = std::fs::File::options().write(true).open(&paths.stdin).unwrap();
    typed.write_all(b" second").unwrap();
    bench.tasks.close_stdin("c", "").unwrap();
    drop(typed);
    let mut input = String::new();
    guest.input.take().unwrap().read_to_string(&mut input).unwrap();
    assert_eq!(input, "first second");
    let mut readers = [&paths.stdout, &paths.stderr].map(|p| std::fs::File::open(p).unwrap());
    drop(guest);
    let texts = readers.each_mut().map(|reader| {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(texts, ["hello", "oh"]);
}
