//! Our unikernel and the world: HTTP over a network of the host's, and sockets to the host.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use mvm_net::Namespace;
use mvm_tests::unikernel::{command, engines};
use mvm_tests::{Cable, Running, World, engine, eventually, http, is_running};

/// Longer than anything that is not stuck takes.
const PATIENCE: Duration = Duration::from_secs(120);

const SERVER: &str = "10.89.0.2:80";

fn server() -> SocketAddr {
    SERVER.parse().expect("an address")
}

/// What the page `/lines/COUNT` has.
fn lines(count: u32) -> String {
    (0..count).map(|n| format!("line {n:>8}\n")).collect()
}

/// What the guest answers to `request`.
fn ask(peer: &Namespace, request: &str) -> io::Result<String> {
    let mut stream = peer.enter(|| TcpStream::connect_timeout(&server(), PATIENCE)).unwrap()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn http_is_answered() {
    for engine in engines() {
        for cpus in ["1", "2"] {
            let cable = Cable::new("http");
            let peer = Namespace::open(&cable.path(1)).unwrap();
            let flags = ["--rm", "--cpus", cpus, "--network", &cable.network()];
            let mut guest = Running::start(command(engine, &flags, &["http=80/13"]));
            guest.wait_for(&format!("http: listening on {SERVER}"));
            let hello = http::get(&peer, server(), "/").expect("a page");
            assert_eq!(hello, "Hello from a unikernel!\nThis is answer 1.\n", "{engine}, {cpus}");
            let many = http::get(&peer, server(), "/lines/20000").expect("a page");
            assert!(many == lines(20_000), "{engine}, {cpus}: {} bytes", many.len());
            // More than one packet, up to the most that there is room for.
            let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(2000));
            for (request, status) in [
                (&long[..], "200 OK"),
                ("HEAD /lines/3 HTTP/1.1\r\n\r\n", "200 OK"),
                ("GET /nothing HTTP/1.1\r\n\r\n", "404 Not Found"),
                ("GET /lines/99999999 HTTP/1.1\r\n\r\n", "404 Not Found"),
                ("POST / HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
                ("nonsense\r\n\r\n", "400 Bad Request"),
                (&"x".repeat(2048), "431 Request Header Fields Too Large"),
            ] {
                let answer = ask(&peer, request).expect("an answer");
                assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
                let body = answer.split_once("\r\n\r\n").expect("a head").1;
                assert_eq!(request.starts_with("HEAD"), body.is_empty(), "{answer}");
            }
            // Several at a time, by different flows, and one that asks for nothing.
            let silent = peer.enter(|| TcpStream::connect_timeout(&server(), PATIENCE)).unwrap();
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let page = http::get(&peer, server(), "/lines/1000").expect("a page");
                        assert!(page == lines(1000));
                    });
                }
            });
            drop(silent);
            let done = guest.finish().expect_code(0);
            assert!(done.out().ends_with("http: 13 requests answered\n"), "{}", done.out());
            cable.nothing_is_left();
        }
    }
}

#[test]
fn a_server_is_stopped() {
    let world = World::small();
    let cable = Cable::new("stopped");
    let peer = Namespace::open(&cable.path(1)).unwrap();
    let network = cable.network();
    let flags = ["-d", "--name", "http-stop", "--network", &network];
    let run = mvm_tests::run_with(command(engine(), &flags, &["http"]), b"", PATIENCE);
    run.expect_code(0);
    eventually("its first word", || world.mvm(&["logs", "http-stop"]).out().contains(SERVER));
    http::get(&peer, server(), "/").expect("a page");
    world.mvm(&["stop", "http-stop"]).expect_code(0);
    assert_eq!(world.mvm(&["wait", "http-stop"]).out(), "143\n");
    world.mvm(&["rm", "http-stop"]).expect_code(0);
    cable.nothing_is_left();
}

/// Connects to `port` of the guest whose door is at `path`.
fn connect(path: &Path, port: u32) -> io::Result<BufReader<UnixStream>> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    if line.starts_with("OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

/// Sends `bytes` while what comes back is read, and then says that there are no more.
fn echo(stream: &mut BufReader<UnixStream>, bytes: &[u8]) {
    let mut writer = stream.get_ref().try_clone().expect("a descriptor");
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(bytes).expect("a guest that listens"));
        let mut back = vec![0; bytes.len()];
        stream.read_exact(&mut back).expect("all of it");
        assert!(back == bytes, "{} bytes come back changed", bytes.len());
    });
}

#[test]
fn the_host_connects_to_a_guests_socket() {
    let dir = tempfile::tempdir().unwrap();
    for engine in engines() {
        let path = dir.path().join("door");
        let flags = ["--rm", "--vsock", path.to_str().unwrap()];
        let mut guest = Running::start(command(engine, &flags, &["vsock=5000/3"]));
        guest.wait_for("vsock: listening on port 5000 of guest 3");
        assert!(connect(&path, 5001).is_err(), "nobody listens there");
        let mut nonsense = UnixStream::connect(&path).unwrap();
        nonsense.set_read_timeout(Some(PATIENCE)).unwrap();
        nonsense.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(!matches!(nonsense.read(&mut [0]), Ok(1..)));
        let mut one = connect(&path, 5000).expect("a connection");
        let mut two = connect(&path, 5000).expect("another one beside it");
        echo(&mut two, b"second");
        echo(&mut one, b"first");
        let bulk: Vec<u8> =
            (0..300_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        echo(&mut one, &bulk);
        // One side has no more to say, and the other answers by ending, too.
        one.get_ref().shutdown(Shutdown::Write).unwrap();
        assert_eq!(one.read(&mut [0]).expect("an end"), 0);
        drop(two);
        drop(connect(&path, 5000).expect("a connection"));
        let done = guest.finish().expect_code(0);
        assert!(done.out().ends_with("vsock: 3 connections\n"), "{}", done.out());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the socket is left");
    }
}

#[test]
fn the_guest_connects_to_a_socket_of_the_hosts() {
    let dir = tempfile::tempdir().unwrap();
    for engine in engines() {
        let path = dir.path().join("door");
        let flags = ["--rm", "--vsock", path.to_str().unwrap()];
        let nobody = mvm_tests::run_with(command(engine, &flags, &["dial=6000"]), b"", PATIENCE);
        let over = "vsock: the connection to port 6000 of the host is over\n";
        assert_eq!(nobody.expect_code(0).out(), over);
        let at = dir.path().join("door_6000");
        let listener = UnixListener::bind(&at).unwrap();
        let guest = Running::start(command(engine, &flags, &["dial=6000"]));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut stream = BufReader::new(stream);
        let mut greeting = String::new();
        stream.read_line(&mut greeting).expect("a greeting");
        assert_eq!(greeting, "Hello from a unikernel!\n");
        echo(&mut stream, b"and back");
        drop(stream);
        assert_eq!(guest.finish().expect_code(0).out(), over);
        fs::remove_file(&at).unwrap();
        assert!(!path.exists());
    }
}

#[test]
fn doors_that_cannot_be_and_doors_that_are_left() {
    let world = World::small();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("door");
    let flags = ["--vsock", path.to_str().unwrap(), "--name", "door"];
    fs::write(&path, "precious").unwrap();
    let run = |flags: &[&str], words: &[&str]| {
        mvm_tests::run_with(command(engine(), flags, words), b"", PATIENCE)
    };
    let refused = run(&flags, &["hello"]).expect_code(125);
    assert!(refused.err().contains("it exists already"), "{}", refused.err());
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::remove_file(&path).unwrap();
    let container = ["run", "--rm", "--vsock", flags[1], "busybox", "true"];
    let container = world.mvm(&container).expect_code(125);
    assert!(container.err().contains("--vsock cannot hold"), "{}", container.err());
    assert_eq!(world.mvm(&["ps", "-aq"]).out(), "");

    // A front door that is killed leaves the socket as long as there is the machine.
    run(&[&flags[..], &["-d"]].concat(), &["vsock=5000"]).expect_code(0);
    eventually("its first word", || world.mvm(&["logs", "door"]).out().contains("vsock:"));
    let owner = world.inspect("door")["owner"]["pid"].as_i64().expect("an owner");
    let owner = nix::unistd::Pid::from_raw(i32::try_from(owner).expect("a process id"));
    nix::sys::signal::kill(owner, nix::sys::signal::Signal::SIGKILL).unwrap();
    eventually("the owner to be gone", || !is_running(owner));
    echo(&mut connect(&path, 5000).expect("a connection"), b"still there");
    world.mvm(&["rm", "-f", "door"]).expect_code(0);
    assert!(!path.exists());
}
