//! A small HTTP/1.1 responder: `/` says hello, `/lines/COUNT` sends that many lines, each of [`LINE`] bytes.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write as _;
use core::ops::Range;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

use crate::net::Network;
use crate::println;
use crate::rt::ring0;

/// Connections at a time. Who comes when all are taken is refused.
const CONNECTIONS: usize = 8;
/// Longest request, up to the empty line.
const REQUEST: usize = 2048;
const SEND_BUFFER: usize = 16 << 10;
/// Ticks that a connection may take in all.
const PATIENCE: u64 = 3000;
/// Bytes of one line.
const LINE: u64 = 14;
const MOST_LINES: u32 = 10_000_000;

/// Answers on `port` until `times` requests have been answered.
pub fn serve(cmdline: &'static str, port: u16, times: u64) {
    let mut network = Network::open(cmdline).unwrap_or_else(|why| panic!("http: {why}"));
    let mut sockets = SocketSet::new(Vec::new());
    let mut connections: Vec<_> =
        (0..CONNECTIONS).map(|_| Connection::new(sockets.add(listener(port)))).collect();
    println!("http: listening on {}:{port}", network.address());
    let (mut asked, mut answered) = (0, 0);
    while answered < times {
        network.poll(&mut sockets);
        for connection in &mut connections {
            let socket = sockets.get_mut::<tcp::Socket>(connection.handle);
            connection.advance(socket, &mut asked);
            if connection.is_over(socket) {
                answered += u64::from(connection.answer.is_some());
                *connection = Connection::new(connection.handle);
                *socket = listener(port);
            }
        }
    }
    println!("http: {answered} requests answered");
}

fn listener(port: u16) -> tcp::Socket<'static> {
    let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(buffer(REQUEST), buffer(SEND_BUFFER));
    // We always offer as much as there is room for: what is left of it below a whole segment need not wait.
    socket.set_nagle_enabled(false);
    socket.listen(port).expect("a port other than 0");
    socket
}

/// One connection, or one to come: a request, and the answer to it.
struct Connection {
    handle: SocketHandle,
    since: u64,
    answer: Option<Answer>,
}

impl Connection {
    fn new(handle: SocketHandle) -> Self {
        Self { handle, since: ring0::ticks(), answer: None }
    }

    /// Does what can be done now.
    fn advance(&mut self, socket: &mut tcp::Socket<'_>, asked: &mut u64) {
        if socket.is_listening() {
            self.since = ring0::ticks();
        } else if ring0::ticks() - self.since > PATIENCE {
            self.answer = None;
            socket.abort();
        } else {
            self.answer = self.answer.take().or_else(|| read_request(socket, asked));
            let over = match &mut self.answer {
                Some(answer) => {
                    // What else comes is of no interest, but without room for it there is none for its end.
                    while socket.recv(|bytes| (bytes.len(), bytes.len())).is_ok_and(|len| len > 0) {
                    }
                    answer.send(socket)
                }
                // Nothing will be asked any more.
                None => socket.state() == tcp::State::CloseWait,
            };
            if over {
                socket.close();
            }
        }
    }

    /// Whether both sides have closed it, or one has broken it off.
    fn is_over(&self, socket: &tcp::Socket<'_>) -> bool {
        matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait)
    }
}

/// The answer to the request that has been received, if all of it has; `asked` counts them.
fn read_request(socket: &mut tcp::Socket<'_>, asked: &mut u64) -> Option<Answer> {
    // Nothing is ever taken out of the buffer, so that all lies in one piece.
    let received = socket.peek(REQUEST).ok()?;
    let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") else {
        let full = received.len() == REQUEST;
        return full.then(|| Answer::error("431 Request Header Fields Too Large"));
    };
    *asked += 1;
    let request = str::from_utf8(&received[..end]).unwrap_or("");
    let mut words = request.lines().next().unwrap_or("").split(' ');
    let (method, path, version) = (words.next()?, words.next(), words.next());
    let Some(path) = path.filter(|_| version.is_some_and(|v| v.starts_with("HTTP/1."))) else {
        return Some(Answer::error("400 Bad Request"));
    };
    let mut answer = match path.strip_prefix("/lines/").map(str::parse) {
        Some(Ok(count)) if count <= MOST_LINES => Answer::lines(count),
        None if path == "/" => {
            let mut text = String::new();
            let _ = write!(text, "Hello from a unikernel!\nThis is answer {asked}.\n");
            Answer::new("200 OK", &text, 0)
        }
        _ => Answer::error("404 Not Found"),
    };
    match method {
        "GET" => {}
        "HEAD" => answer.leave_out_body(),
        _ => answer = Answer::error("405 Method Not Allowed"),
    }
    Some(answer)
}

/// An answer on its way.
struct Answer {
    /// What is sent first, or the current line, and how much of it has been.
    text: String,
    sent: usize,
    /// Lines that follow.
    lines: Range<u32>,
}

impl Answer {
    fn error(status: &str) -> Self {
        Self::new(status, status, 0)
    }

    fn lines(count: u32) -> Self {
        Self::new("200 OK", "", count)
    }

    fn new(status: &str, body: &str, lines: u32) -> Self {
        let len = body.len() as u64 + u64::from(lines) * LINE;
        let mut text = String::new();
        let _ = write!(
            text,
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
        );
        Self { text, sent: 0, lines: 0..lines }
    }

    fn leave_out_body(&mut self) {
        self.lines = 0..0;
        if let Some(end) = self.text.find("\r\n\r\n") {
            self.text.truncate(end + 4);
        }
    }

    /// Sends as much as there is room for. Returns whether that was the last of it.
    fn send(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        loop {
            while self.sent < self.text.len() {
                match socket.send_slice(&self.text.as_bytes()[self.sent..]) {
                    Ok(0) => return false,
                    Ok(sent) => self.sent += sent,
                    // The other side has broken it off.
                    Err(_) => return true,
                }
            }
            let Some(line) = self.lines.next() else { return true };
            self.text.clear();
            self.sent = 0;
            let _ = writeln!(self.text, "line {line:>8}");
        }
    }
}
