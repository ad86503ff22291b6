//! The asking side of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::protocol::{Request, Response, Stats, Status};

/// Longest answer in bytes that is taken.
const MAX_RESPONSE: u64 = 1 << 20;

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The monitor cannot be reached or fell silent.
    #[error("the monitor does not answer: {what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The answer is no answer.
    #[error("the monitor's answer could not be understood: {0}")]
    Answer(String),
    /// The monitor refused.
    #[error("the monitor refused: {0}")]
    Refused(String),
}

/// A connection to a monitor's control socket.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects to the socket at `path`; every request then has to be answered within `timeout`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, Error> {
        let failed = |what| move |source| Error::Io { what, source };
        let stream = UnixStream::connect(path).map_err(failed("connect"))?;
        stream.set_read_timeout(Some(timeout)).map_err(failed("set the deadline"))?;
        stream.set_write_timeout(Some(timeout)).map_err(failed("set the deadline"))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// No answer, or [`Response::Error`].
    pub fn request(&mut self, request: &Request) -> Result<Response, Error> {
        let failed = |what| move |source| Error::Io { what, source };
        let mut line = serde_json::to_vec(request).map_err(|e| Error::Answer(e.to_string()))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(failed("send"))?;
        let mut answer = String::new();
        let mut limited = self.stream.by_ref().take(MAX_RESPONSE);
        if limited.read_line(&mut answer).map_err(failed("receive"))? == 0 {
            return Err(failed("receive")(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&answer) {
            Ok(Response::Error { message }) => Err(Error::Refused(message)),
            Ok(response) => Ok(response),
            Err(error) => Err(Error::Answer(error.to_string())),
        }
    }

    /// Where the machine is.
    ///
    /// # Errors
    /// As [`ControlClient::request`].
    pub fn status(&mut self) -> Result<Status, Error> {
        match self.request(&Request::Status)? {
            Response::Status(status) => Ok(status),
            other => Err(Error::Answer(format!("{other:?} to a status request"))),
        }
    }

    /// What the machine costs.
    ///
    /// # Errors
    /// As [`ControlClient::request`].
    pub fn stats(&mut self) -> Result<Stats, Error> {
        match self.request(&Request::Stats)? {
            Response::Stats(stats) => Ok(stats),
            other => Err(Error::Answer(format!("{other:?} to a stats request"))),
        }
    }

    /// Ends the machine at once.
    ///
    /// # Errors
    /// As [`ControlClient::request`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.request(&Request::Stop).map(drop)
    }
}
