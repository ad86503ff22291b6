//! The calling side.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protobuf::Message;
use ttrpc::Code;
use ttrpc::proto::{
    MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, Request, Response,
};

use super::server::Status;
use super::wire::{read_frame, write_frame};
use crate::SERVICE;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent refused the call, or it is too large to be sent.
    #[error("{method}: {status}")]
    Refused {
        /// The method called.
        method: &'static str,
        /// The agent's answer.
        status: Status,
    },
    /// The connection to the agent ended.
    #[error("{method}: the connection to the guest agent ended: {reason}")]
    Closed {
        /// The method called.
        method: &'static str,
        /// What ended it.
        reason: String,
    },
    /// No answer came in time.
    #[error("{method}: no answer from the guest agent within {after:?}")]
    Timeout {
        /// The method called.
        method: &'static str,
        /// The deadline that passed.
        after: Duration,
    },
    /// The answer cannot be decoded.
    #[error("{method}: malformed message: {source}")]
    Malformed {
        /// The method called.
        method: &'static str,
        /// What the decoder says.
        source: protobuf::Error,
    },
}

impl CallError {
    /// The agent's status code if it was the agent who refused.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { status, .. } => Some(status.code),
            _ => None,
        }
    }
}

/// A control connection to an agent. Clones share it; calls may overlap. It ends with the last clone.
#[derive(Debug, Clone)]
pub struct Client {
    connection: Arc<Connection>,
}

#[derive(Debug)]
struct Connection {
    writer: Mutex<UnixStream>,
    calls: Arc<Mutex<Calls>>,
}

#[derive(Debug, Default)]
struct Calls {
    last_id: u32,
    waiting: HashMap<u32, SyncSender<Response>>,
    /// Set once the connection has ended.
    closed: Option<String>,
}

impl Connection {
    /// Writes a request. An agent that reads nothing for `timeout` holds nobody up for longer; the connection ends then, for
    /// nothing can follow a part of a frame.
    fn write(&self, id: u32, frame: &[u8], timeout: Duration) -> io::Result<()> {
        let mut writer = lock(&self.writer);
        // Zero would mean no limit.
        writer.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        write_frame(&mut *writer, MESSAGE_TYPE_REQUEST, id, frame).inspect_err(|_| {
            let _ = writer.shutdown(Shutdown::Both);
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Wakes the reader, which holds a descriptor of its own.
        let _ = lock(&self.writer).shutdown(Shutdown::Both);
    }
}

impl Client {
    /// Takes over a stream connected to the agent's control port and starts its reader thread.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated or the thread not started.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let calls = Arc::new(Mutex::new(Calls::default()));
        let mut reader = stream.try_clone()?;
        let reader_calls = Arc::clone(&calls);
        std::thread::Builder::new().name("agent-rpc".into()).spawn(move || {
            let reason = loop {
                match read_frame(&mut reader) {
                    Ok(Some((header, payload))) if header.type_ == MESSAGE_TYPE_RESPONSE => {
                        match Response::parse_from_bytes(&payload) {
                            Ok(response) => deliver(&reader_calls, header.stream_id, response),
                            Err(e) => break format!("malformed response: {e}"),
                        }
                    }
                    Ok(Some((header, _))) => {
                        break format!("message of unexpected type {}", header.type_);
                    }
                    Ok(None) => break "closed by the guest".into(),
                    Err(e) => break e.to_string(),
                }
            };
            let mut calls = lock(&reader_calls);
            calls.closed = Some(reason);
            calls.waiting.clear();
        })?;
        Ok(Self { connection: Arc::new(Connection { writer: Mutex::new(stream), calls }) })
    }

    pub(super) fn call<R: Message>(
        &self,
        method: &'static str,
        request: &impl Message,
        timeout: Duration,
    ) -> Result<R, CallError> {
        let malformed = |source| CallError::Malformed { method, source };
        let mut envelope = Request::new();
        envelope.service = SERVICE.into();
        envelope.method = method.into();
        envelope.payload = request.write_to_bytes().map_err(malformed)?;
        envelope.timeout_nano = i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX);
        let frame = envelope.write_to_bytes().map_err(malformed)?;
        if frame.len() > MESSAGE_LENGTH_MAX {
            let message = format!(
                "the request has {} bytes, at most {MESSAGE_LENGTH_MAX} fit a message",
                frame.len()
            );
            let status = Status::new(Code::RESOURCE_EXHAUSTED, message);
            return Err(CallError::Refused { method, status });
        }

        let (sender, receiver) = sync_channel(1);
        let id = {
            let mut calls = lock(&self.connection.calls);
            if let Some(reason) = &calls.closed {
                return Err(CallError::Closed { method, reason: reason.clone() });
            }
            // Client streams have odd ids.
            calls.last_id = calls.last_id.wrapping_add(if calls.last_id == 0 { 1 } else { 2 });
            let id = calls.last_id;
            calls.waiting.insert(id, sender);
            id
        };
        if let Err(e) = self.connection.write(id, &frame, timeout) {
            lock(&self.connection.calls).waiting.remove(&id);
            return Err(match e.kind() {
                io::ErrorKind::WouldBlock => CallError::Timeout { method, after: timeout },
                _ => CallError::Closed { method, reason: e.to_string() },
            });
        }
        match receiver.recv_timeout(timeout) {
            Ok(response) => match response.status.as_ref() {
                Some(status) if status.code() != Code::OK => Err(CallError::Refused {
                    method,
                    status: Status::new(status.code(), status.message()),
                }),
                _ => R::parse_from_bytes(&response.payload).map_err(malformed),
            },
            Err(RecvTimeoutError::Timeout) => {
                lock(&self.connection.calls).waiting.remove(&id);
                Err(CallError::Timeout { method, after: timeout })
            }
            Err(RecvTimeoutError::Disconnected) => {
                let reason = lock(&self.connection.calls).closed.clone().unwrap_or_default();
                Err(CallError::Closed { method, reason })
            }
        }
    }
}

/// Hands a response to the call that waits for it; one that gave up is no longer there.
fn deliver(calls: &Mutex<Calls>, id: u32, response: Response) {
    if let Some(sender) = lock(calls).waiting.remove(&id) {
        let _ = sender.try_send(response);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
