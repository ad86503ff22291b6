//! The control socket's server: many clients, none of which can hold up the monitor.
//!
//! Connections are never waited for: what can be read is read, what can be written is written, and
//! a client that makes no progress is dropped. One request is under way per connection.

use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use super::fds;
use super::protocol::{Request, Response};

/// Most clients at a time; a further one takes the place of the one that was silent longest.
const MAX_CLIENTS: usize = 16;

/// Longest request in bytes.
const MAX_REQUEST: usize = 4096;

/// How long a client may leave an answer unread, or a request half-written.
const PROGRESS_DEADLINE: Duration = Duration::from_secs(5);

/// Answers requests.
pub(super) trait Answerer {
    /// Carries out `request`, with the descriptor that came along.
    fn answer(&self, request: Request, fd: Option<OwnedFd>) -> Response;
}

/// The server. Without a listener it serves nobody.
#[derive(Debug)]
pub(super) struct Server {
    listener: Option<UnixListener>,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// What came with it. One at most is kept for a client.
    fd: Option<OwnedFd>,
    output: Vec<u8>,
    /// When it last got on.
    progress: Instant,
    gone: bool,
}

impl Server {
    /// A server for `listener`.
    pub fn new(listener: Option<UnixListener>) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Self { listener, clients: Vec::new() })
    }

    /// Adds what the server waits for.
    pub fn waits<'a>(&'a self, waits: &mut Vec<PollFd<'a>>) {
        waits.extend(self.listener.iter().map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN)));
        waits.extend(self.clients.iter().map(|client| {
            let flags =
                if client.output.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            PollFd::new(client.stream.as_fd(), flags)
        }));
    }

    /// How long until a client has to be given up.
    pub fn next_deadline(&self) -> Option<Duration> {
        let busy = self.clients.iter().filter(|c| c.is_busy());
        busy.map(|c| PROGRESS_DEADLINE.saturating_sub(c.progress.elapsed())).min()
    }

    /// Does whatever can be done without waiting.
    pub fn serve(&mut self, answerer: &dyn Answerer) {
        self.accept();
        for client in &mut self.clients {
            client.serve(answerer);
        }
        self.clients.retain(|client| !client.gone);
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        // A bounded number a time: the machine has its turn in between.
        for _ in 0..MAX_CLIENTS {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    // For instance out of descriptors: told once a call, the client tries again.
                    tracing::warn!("control socket: {error}");
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.clients.len() >= MAX_CLIENTS {
                let oldest = (0..self.clients.len()).min_by_key(|&i| self.clients[i].progress);
                oldest.map(|index| self.clients.swap_remove(index));
            }
            self.clients.push(Client {
                stream,
                input: Vec::new(),
                fd: None,
                output: Vec::new(),
                progress: Instant::now(),
                gone: false,
            });
        }
    }
}

impl Client {
    /// In the middle of a request or an answer.
    fn is_busy(&self) -> bool {
        !self.input.is_empty() || !self.output.is_empty()
    }

    fn serve(&mut self, answerer: &dyn Answerer) {
        self.write();
        if self.output.is_empty() && !self.gone {
            self.read();
            if let Some(end) = self.input.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                self.reply(answerer, &line);
                self.write();
            } else if self.input.len() >= MAX_REQUEST {
                self.gone = true;
            }
        }
        self.gone |= self.is_busy() && self.progress.elapsed() >= PROGRESS_DEADLINE;
    }

    fn reply(&mut self, answerer: &dyn Answerer, line: &[u8]) {
        let fd = self.fd.take();
        let response = match serde_json::from_slice(line) {
            Ok(request) => answerer.answer(request, fd),
            Err(error) => Response::Error { message: format!("not understood: {error}") },
        };
        match serde_json::to_vec(&response) {
            Ok(mut json) => {
                json.push(b'\n');
                self.output = json;
            }
            Err(_) => self.gone = true,
        }
    }

    fn read(&mut self) {
        let mut buf = [0; MAX_REQUEST];
        let room = MAX_REQUEST - self.input.len().min(MAX_REQUEST);
        if room == 0 {
            return;
        }
        match fds::receive_one(&self.stream, &mut buf[..room]) {
            Ok((0, _)) => self.gone = true,
            Ok((n, fd)) => {
                self.input.extend_from_slice(&buf[..n]);
                self.fd = fd.or(self.fd.take());
                self.progress = Instant::now();
            }
            Err(e) if retry(&e) => {}
            Err(_) => self.gone = true,
        }
    }

    fn write(&mut self) {
        while !self.output.is_empty() && !self.gone {
            match self.stream.write(&self.output) {
                Ok(0) => self.gone = true,
                Ok(n) => {
                    self.output.drain(..n);
                    self.progress = Instant::now();
                }
                Err(e) if retry(&e) => return,
                Err(_) => self.gone = true,
            }
        }
    }
}

fn retry(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::ControlClient;
    use std::io::Read;
    use std::os::unix::net::SocketAddr;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Long;
    impl Answerer for Long {
        fn answer(&self, request: Request, fd: Option<OwnedFd>) -> Response {
            match request {
                Request::Plug { read_only } => match (fd, read_only) {
                    (Some(fd), true) => {
                        let mut text = String::new();
                        let read = std::fs::File::from(fd).read_to_string(&mut text);
                        Response::ConsoleTail { text: read.map_or("unreadable".into(), |_| text) }
                    }
                    (fd, _) => Response::Error { message: format!("descriptor: {}", fd.is_some()) },
                },
                Request::ConsoleTail => Response::ConsoleTail { text: "x".repeat(900_000) },
                Request::Stop => Response::Error { message: "no".into() },
                _ => Response::Ok,
            }
        }
    }

    fn server() -> (Server, SocketAddr, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("control")).unwrap();
        let address = listener.local_addr().unwrap();
        (Server::new(Some(listener)).unwrap(), address, dir)
    }

    fn turn(server: &mut Server) {
        for _ in 0..3 {
            server.serve(&Long);
        }
    }

    /// Serves whoever asks, until `done` is set.
    fn serve_until(server: &mut Server, done: &AtomicBool) {
        while !done.load(Ordering::Acquire) {
            let mut waits = Vec::new();
            server.waits(&mut waits);
            nix::poll::poll(&mut waits, 20u8).unwrap();
            server.serve(&Long);
        }
    }

    #[test]
    fn clients_get_answers_however_long() {
        let (mut server, address, _dir) = server();
        let path = address.as_pathname().unwrap().to_owned();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut client = ControlClient::connect(&path, Duration::from_secs(10)).unwrap();
                assert_eq!(client.request(&Request::Pause).unwrap(), Response::Ok);
                let Ok(Response::ConsoleTail { text }) = client.request(&Request::ConsoleTail)
                else {
                    panic!("no tail");
                };
                assert_eq!(text.len(), 900_000);
                assert!(client.stop().unwrap_err().to_string().contains("refused: no"));
                done.store(true, Ordering::Release);
            });
            serve_until(&mut server, &done);
        });
        turn(&mut server);
        assert!(server.clients.is_empty());
    }

    #[test]
    fn a_descriptor_goes_with_its_request_and_no_other() {
        let (mut server, address, dir) = server();
        let path = dir.path().join("disk");
        std::fs::write(&path, "content").unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let socket = address.as_pathname().unwrap();
                let mut client = ControlClient::connect(socket, Duration::from_secs(10)).unwrap();
                let plug = |read_only| Request::Plug { read_only };
                let file = std::fs::File::open(&path).unwrap();
                let answer = client.request_with(&plug(true), file.as_fd()).unwrap();
                assert_eq!(answer, Response::ConsoleTail { text: "content".into() });
                let refused = client.request(&plug(false)).unwrap_err().to_string();
                assert!(refused.contains("descriptor: false"), "{refused}");
                // One that came with another request is not kept for a later one.
                client.request_with(&Request::Pause, file.as_fd()).unwrap();
                let refused = client.request(&plug(true)).unwrap_err().to_string();
                assert!(refused.contains("descriptor: false"), "{refused}");
                done.store(true, Ordering::Release);
            });
            serve_until(&mut server, &done);
        });
    }

    #[test]
    fn descriptors_that_nobody_asked_for_are_closed() {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        use std::os::fd::AsRawFd;
        let (mut server, address, _dir) = server();
        let client = UnixStream::connect_addr(&address).unwrap();
        let (ends, begins): (Vec<_>, Vec<_>) = (0..5).map(|_| io::pipe().unwrap()).unzip();
        let raw: Vec<_> = begins.iter().map(AsRawFd::as_raw_fd).collect();
        let text = [io::IoSlice::new(b"{\"request\":\"pause\"}\n")];
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(client.as_raw_fd(), &text, &rights, MsgFlags::empty(), None).unwrap();
        drop(begins);
        turn(&mut server);
        // None of the pipes has somebody who could write.
        let mut waits: Vec<_> =
            ends.iter().map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN)).collect();
        nix::poll::poll(&mut waits, 0u8).unwrap();
        assert!(waits.iter().all(|w| w.revents() == Some(PollFlags::POLLHUP)), "{waits:?}");
        drop(client);
    }

    #[test]
    fn nonsense_gets_an_error_and_endless_lines_the_door() {
        let (mut server, address, _dir) = server();
        let mut client = UnixStream::connect_addr(&address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.write_all(b"{\"request\":\"fly\"}\n").unwrap();
        turn(&mut server);
        let mut answer = [0; 512];
        let n = client.read(&mut answer).unwrap();
        assert!(String::from_utf8_lossy(&answer[..n]).contains("not understood"));
        client.write_all(&[b'x'; MAX_REQUEST + 5]).unwrap();
        turn(&mut server);
        assert!(server.clients.is_empty());
    }

    #[test]
    fn a_crowd_of_silent_clients_does_not_keep_others_out() {
        let (mut server, address, _dir) = server();
        let mut crowd = Vec::new();
        for _ in 0..4 * MAX_CLIENTS {
            crowd.push(UnixStream::connect_addr(&address).unwrap());
            server.serve(&Long);
        }
        assert_eq!(server.clients.len(), MAX_CLIENTS);
        let mut client = UnixStream::connect_addr(&address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.write_all(b"{\"request\":\"resume\"}\n").unwrap();
        turn(&mut server);
        let mut answer = [0; 64];
        let n = client.read(&mut answer).unwrap();
        assert_eq!(&answer[..n], b"{\"response\":\"ok\"}\n");
        assert!(server.next_deadline().is_none(), "silent ones between requests may stay");
    }
}
