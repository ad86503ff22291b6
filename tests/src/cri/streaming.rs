//! The streaming side of CRI: exec, attach and port-forward over a WebSocket, with the subprotocol
//! `v4.channel.k8s.io`. Each message begins with the number of its channel.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::time::Duration;

use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

/// Long enough for anything that is not stuck, on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

const PROTOCOL: HeaderValue = HeaderValue::from_static("v4.channel.k8s.io");

/// Channels of exec and attach.
pub const STDIN: u8 = 0;
/// What the process writes.
pub const STDOUT: u8 = 1;
/// What it writes as errors.
pub const STDERR: u8 = 2;
/// How it ended, as JSON.
pub const STATUS: u8 = 3;
/// The size of its terminal, as JSON.
pub const RESIZE: u8 = 4;

/// One connection to where a call of CRI said that it can be made.
#[derive(Debug)]
pub struct Session {
    socket: WebSocket<TcpStream>,
    heard: BTreeMap<u8, Vec<u8>>,
    over: bool,
}

impl Session {
    /// Connects to `url`.
    ///
    /// # Panics
    /// If that is refused.
    #[track_caller]
    pub fn open(url: &str) -> Self {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request().expect("an address");
        request.headers_mut().insert("sec-websocket-protocol", PROTOCOL);
        let server = request.uri().authority().expect("an address").as_str().to_owned();
        let stream = TcpStream::connect(&server).unwrap_or_else(|e| panic!("{server}: {e}"));
        stream.set_read_timeout(Some(DEADLINE)).expect("a limit");
        stream.set_write_timeout(Some(DEADLINE)).expect("a limit");
        let (socket, _) =
            tungstenite::client(request, stream).unwrap_or_else(|e| panic!("{url}: {e}"));
        Self { socket, heard: BTreeMap::new(), over: false }
    }

    /// Says something on a channel.
    ///
    /// # Panics
    /// If the connection is over.
    #[track_caller]
    pub fn say(&mut self, channel: u8, data: &[u8]) {
        let message = [&[channel], data].concat();
        self.socket.send(Message::binary(message)).expect("a connection");
    }

    /// What has been heard on a channel so far.
    pub fn heard(&self, channel: u8) -> &[u8] {
        self.heard.get(&channel).map_or(&[], Vec::as_slice)
    }

    /// The same as text.
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.heard(channel)).into_owned()
    }

    /// Waits until `text` has come on a channel.
    ///
    /// # Panics
    /// If the connection ends before, or nothing comes for long.
    #[track_caller]
    pub fn wait_for(&mut self, channel: u8, text: &str) {
        while !self.text(channel).contains(text) {
            assert!(self.next(), "it ended without {text:?}: {self:?}");
        }
    }

    /// Waits for the end of the connection.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn wait(&mut self) {
        while self.next() {}
    }

    /// How the process ended, according to the channel for that: its exit code, or the reason why it
    /// did not start.
    ///
    /// # Panics
    /// If nothing was said about it.
    #[track_caller]
    pub fn code(&mut self) -> Result<i32, String> {
        self.wait();
        let text = self.text(STATUS);
        let status: serde_json::Value =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in {text:?}: {self:?}"));
        if status["status"] == "Success" {
            return Ok(0);
        }
        let code = status["details"]["causes"][0]["message"].as_str().and_then(|m| m.parse().ok());
        code.ok_or(text)
    }

    /// Takes one message in; false at the end.
    #[track_caller]
    fn next(&mut self) -> bool {
        if self.over {
            return false;
        }
        match self.socket.read() {
            Ok(Message::Binary(message)) => {
                if let [channel, data @ ..] = &message[..] {
                    self.heard.entry(*channel).or_default().extend_from_slice(data);
                }
            }
            Ok(Message::Close(_)) => self.over = true,
            Ok(_) => {}
            Err(tungstenite::Error::Io(e))
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                panic!("nothing came for {DEADLINE:?}: {self:?}")
            }
            // Not every server says farewell.
            Err(_) => self.over = true,
        }
        !self.over
    }
}
