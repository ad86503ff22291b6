use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::*;

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    path.display().to_string()
}

/// Streams with both outputs, and the guest's ends of them.
fn outputs() -> (Streams, UnixStream, UnixStream) {
    let (output, guest_output) = UnixStream::pair().unwrap();
    let (error, guest_error) = UnixStream::pair().unwrap();
    let streams = Streams { input: None, output: Some(output), error: Some(error) };
    (streams, guest_output, guest_error)
}

fn owner() -> Owner {
    Owner { container: "c1".into(), namespace: "ns1".into() }
}

#[test]
fn files_take_both_streams_and_keep_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "before\n").unwrap();
    let uri = format!("file://{}", path.display());
    let paths = Paths { stdout: uri.clone(), stderr: uri, ..Paths::default() };
    let io = Io::open(&paths, &owner()).unwrap();
    assert!(io.stdio().output && !io.stdio().stdin);
    let (streams, mut output, mut error) = outputs();
    io.connect(streams).unwrap();
    output.write_all(b"out\n").unwrap();
    drop(output);
    error.write_all(b"err\n").unwrap();
    drop(error);
    io.finish();
    let text = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["before", "err", "out"]);
}

#[test]
fn loggers_get_both_streams_and_are_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("logger");
    let script = "#!/bin/sh\nexec 5>&-\ncat <&3 >\"$2.out\" &\ncat <&4 >\"$2.err\"\nwait\n\
                  echo \"$1 $CONTAINER_ID $CONTAINER_NAMESPACE\" >\"$2.who\"\n";
    // By another process: one of this process's children might otherwise hold it open for writing
    // between fork and exec, and then it cannot be executed.
    let mut tee = std::process::Command::new("tee")
        .arg(&program)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    tee.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(tee.wait().unwrap().success());
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, mode).unwrap();
    let base = dir.path().join("log");
    let uri = format!("binary://{}?--to={}", program.display(), base.display());
    let paths = Paths { stdout: uri, ..Paths::default() };
    let io = Io::open(&paths, &owner()).unwrap();
    let (streams, mut output, mut error) = outputs();
    io.connect(streams).unwrap();
    output.write_all(b"to out").unwrap();
    error.write_all(b"to err").unwrap();
    drop((output, error));
    io.finish();
    let read = |end: &str| std::fs::read_to_string(format!("{}.{end}", base.display())).unwrap();
    assert_eq!(read("out"), "to out");
    assert_eq!(read("err"), "to err");
    assert_eq!(read("who"), "--to c1 ns1\n");
}

#[test]
fn a_logger_that_is_not_there_is_named() {
    let paths = Paths { stdout: "binary:///no/such/logger".into(), ..Paths::default() };
    let error = Io::open(&paths, &owner()).unwrap_err();
    assert!(error.to_string().contains("/no/such/logger"), "{error}");
}

#[test]
fn a_reader_that_goes_and_comes_back_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), ..Paths::default() };
    let io = Io::open(&paths, &owner()).unwrap();
    let (streams, mut output, _error) = outputs();
    io.connect(streams).unwrap();
    let mut reader = File::open(&paths.stdout).unwrap();
    output.write_all(b"one").unwrap();
    let mut bytes = [0; 3];
    reader.read_exact(&mut bytes).unwrap();
    drop(reader);
    output.write_all(b"two").unwrap();
    let mut reader = File::open(&paths.stdout).unwrap();
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"two");
}

#[test]
fn many_megabytes_pass_a_slow_reader() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), ..Paths::default() };
    let io = Io::open(&paths, &owner()).unwrap();
    let (streams, mut output, error) = outputs();
    io.connect(streams).unwrap();
    drop(error);
    let data: Vec<u8> = (0..20_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || output.write_all(&sent).unwrap());
    let mut reader = File::open(&paths.stdout).unwrap();
    let mut got = vec![0; data.len()];
    for part in got.chunks_mut(1 << 20) {
        reader.read_exact(part).unwrap();
    }
    writer.join().unwrap();
    assert!(got == data);
    // Its process is gone and the writers with it: the end of file.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    io.finish();
}

#[test]
fn output_that_nobody_reads_does_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), ..Paths::default() };
    let io = Io::open(&paths, &owner()).unwrap();
    let (streams, output, _error) = outputs();
    io.connect(streams).unwrap();
    // More than fifo and sockets hold.
    output.set_nonblocking(true).unwrap();
    while (&output).write(&[0; 4096]).is_ok() {}
    io.finish();
    assert!(io.ends().stdout.is_none());
}

#[test]
fn terminal_input_has_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths {
        stdin: fifo(dir.path(), "in"),
        stdout: fifo(dir.path(), "out"),
        terminal: true,
        ..Paths::default()
    };
    let io = Io::open(&paths, &owner()).unwrap();
    assert!(io.stdio().terminal);
    let (host, mut guest) = UnixStream::pair().unwrap();
    let input = host.try_clone().unwrap();
    io.connect(Streams { input: Some(input), output: Some(host), error: None }).unwrap();
    let mut typed = File::options().write(true).open(&paths.stdin).unwrap();
    typed.write_all(b"keys").unwrap();
    let mut keys = [0; 4];
    guest.read_exact(&mut keys).unwrap();
    io.close_stdin();
    drop(typed);
    guest.write_all(b"shown").unwrap();
    let mut shown = [0; 5];
    File::open(&paths.stdout).unwrap().read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"shown");
    let mut fds = [nix::poll::PollFd::new(guest.as_fd(), nix::poll::PollFlags::POLLIN)];
    assert_eq!(nix::poll::poll(&mut fds, 0u8).unwrap(), 0, "the terminal was hung up");
}

#[test]
fn a_stream_of_which_there_is_nothing_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths {
        stdout: fifo(dir.path(), "out"),
        stderr: fifo(dir.path(), "err"),
        ..Paths::default()
    };
    let io = Io::open(&paths, &owner()).unwrap();
    let open = |path: &str| open(Path::new(path), OpenOptions::new().read(true)).unwrap();
    let (mut out, mut err) = (open(&paths.stdout), open(&paths.stderr));
    // As the machine of a unikernel has it: a console.
    let (output, mut guest) = UnixStream::pair().unwrap();
    io.connect(Streams { input: None, output: Some(output), error: None }).unwrap();
    assert_eq!(err.read(&mut [0]).unwrap(), 0, "the end of the other stream");
    // This one goes on, and ends with what it comes from.
    let kind = out.read(&mut [0]).unwrap_err().kind();
    assert_eq!(kind, io::ErrorKind::WouldBlock);
    guest.write_all(b"said").unwrap();
    drop(guest);
    io.finish();
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert_eq!(text, "said");
}
