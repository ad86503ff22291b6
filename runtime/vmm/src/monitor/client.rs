//! The asking side of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::fds;
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
        self.ask(request, None)
    }

    /// The same, of a request with which a descriptor goes.
    ///
    /// # Errors
    /// As [`ControlClient::request`].
    pub fn request_with(
        &mut self,
        request: &Request,
        fd: BorrowedFd<'_>,
    ) -> Result<Response, Error> {
        self.ask(request, Some(fd))
    }

    fn ask(&mut self, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<Response, Error> {
        let failed = |what| move |source| Error::Io { what, source };
        let mut line = serde_json::to_vec(request).map_err(|e| Error::Answer(e.to_string()))?;
        line.push(b'\n');
        let sent = match fd {
            Some(fd) => fds::send_one(self.stream.get_ref(), &line, fd).map_err(failed("send"))?,
            None => 0,
        };
        self.stream.get_mut().write_all(&line[sent..]).map_err(failed("send"))?;
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

    /// Puts a disk into a place kept for one. Returns the number of its register window.
    ///
    /// # Errors
    /// As [`ControlClient::request`]; there is no place left.
    pub fn plug(&mut self, disk: BorrowedFd<'_>, read_only: bool) -> Result<u32, Error> {
        match self.request_with(&Request::Plug { read_only }, disk)? {
            Response::Plugged { place } => Ok(place),
            other => Err(Error::Answer(format!("{other:?} to a disk"))),
        }
    }

    /// Takes out the disk at `place`, of which the guest has let go.
    ///
    /// # Errors
    /// As [`ControlClient::request`]; there is none.
    pub fn unplug(&mut self, place: u32) -> Result<(), Error> {
        self.request(&Request::Unplug { place }).map(drop)
    }

    /// Asks the guest to make the machine's memory `bytes` in all, and does not wait for it.
    ///
    /// # Errors
    /// As [`ControlClient::request`]; the machine cannot have that much.
    pub fn resize(&mut self, bytes: u64) -> Result<(), Error> {
        self.request(&Request::Resize { memory: bytes }).map(drop)
    }

    /// Ends the machine at once.
    ///
    /// # Errors
    /// As [`ControlClient::request`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.request(&Request::Stop).map(drop)
    }
}
