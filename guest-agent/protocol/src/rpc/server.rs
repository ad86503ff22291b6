//! The answering side: one accepted connection, a thread for each call.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use protobuf::Message;
use ttrpc::Code;
use ttrpc::proto::{
    MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, Request, Response,
};

use super::service::{Agent, dispatch};
use super::wire::{read_frame, write_frame};
use crate::SERVICE;

/// Calls of one connection that may run at a time; more are refused with `RESOURCE_EXHAUSTED`.
///
/// Most of them are `WaitProcess`, of which a host has one per process.
pub const MAX_CALLS: usize = 256;

/// What of a frame is left for the answer itself, bytes.
const MAX_PAYLOAD: usize = MESSAGE_LENGTH_MAX - 64;

/// The refusal of a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Status {
    /// Its class.
    pub code: Code,
    /// What happened, where, what to do.
    pub message: String,
}

impl Status {
    /// A status of class `code`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.message, self.code)
    }
}

/// Answers the calls that arrive on `stream` until it ends. Calls still running then go on, but
/// their answers are dropped. The caller has checked who is at the other end.
///
/// # Errors
/// When the connection breaks or carries something that is not ttrpc.
pub fn serve(stream: UnixStream, agent: &Arc<dyn Agent>) -> io::Result<()> {
    let writer = Arc::new(Mutex::new(stream.try_clone()?));
    let result = read_calls(&stream, &writer, agent);
    // The clones held by running calls would keep the connection open.
    let _ = stream.shutdown(Shutdown::Both);
    result
}

fn read_calls(
    mut stream: &UnixStream,
    writer: &Arc<Mutex<UnixStream>>,
    agent: &Arc<dyn Agent>,
) -> io::Result<()> {
    let running = Arc::new(AtomicUsize::new(0));
    while let Some((header, payload)) = read_frame(&mut stream)? {
        if header.type_ != MESSAGE_TYPE_REQUEST {
            let kind = header.type_;
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("message of type {kind}, only requests are expected"),
            ));
        }
        let call = Running::begin(&running);
        let id = header.stream_id;
        if running.load(Ordering::Relaxed) > MAX_CALLS {
            let status = Status::new(
                Code::RESOURCE_EXHAUSTED,
                format!("{MAX_CALLS} calls are running on this connection already"),
            );
            respond(writer, id, Err(status))?;
            continue;
        }
        let (call_writer, call_agent) = (Arc::clone(writer), Arc::clone(agent));
        let spawned = std::thread::Builder::new().name("call".into()).spawn(move || {
            let _call = call;
            let result = handle(&*call_agent, &payload);
            // The connection's reader notices a broken connection too, and says so.
            let _ = respond(&call_writer, id, result);
        });
        if let Err(e) = spawned {
            let status =
                Status::new(Code::RESOURCE_EXHAUSTED, format!("cannot start a thread: {e}"));
            respond(writer, id, Err(status))?;
        }
    }
    Ok(())
}

fn handle(agent: &dyn Agent, payload: &[u8]) -> Result<Vec<u8>, Status> {
    let request = Request::parse_from_bytes(payload)
        .map_err(|e| Status::new(Code::INVALID_ARGUMENT, format!("malformed request: {e}")))?;
    if request.service != SERVICE {
        return Err(Status::new(
            Code::UNIMPLEMENTED,
            format!("no service {:?} here, only {SERVICE}", request.service),
        ));
    }
    dispatch(agent, &request.method, &request.payload)
}

fn respond(writer: &Mutex<UnixStream>, id: u32, result: Result<Vec<u8>, Status>) -> io::Result<()> {
    let result = result.and_then(|payload| {
        if payload.len() <= MAX_PAYLOAD {
            return Ok(payload);
        }
        let message =
            format!("the answer has {} bytes, at most {MAX_PAYLOAD} fit a message", payload.len());
        Err(Status::new(Code::RESOURCE_EXHAUSTED, message))
    });
    let mut response = Response::new();
    match result {
        Ok(payload) => {
            response.payload = payload;
            response.set_status(ttrpc::get_status(Code::OK, ""));
        }
        Err(status) => response.set_status(ttrpc::get_status(status.code, status.message)),
    }
    let bytes = response.write_to_bytes().map_err(io::Error::other)?;
    let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
    write_frame(&mut *writer, MESSAGE_TYPE_RESPONSE, id, &bytes)
}

/// Counts one running call while it lives.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
