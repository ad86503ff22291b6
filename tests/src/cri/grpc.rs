//! Calls of a gRPC service on a unix socket, one at a time, each on a connection of its own: all that
//! the tests need of gRPC (its description: "gRPC over HTTP2").

use std::io;
use std::path::Path;
use std::time::Duration;

use h2::client;
use protobuf::Message;
use tokio::net::UnixStream;

/// Longest answer that is taken, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// Length of what stands before a message: a flag for compression, and the message's length.
const PREFIX: usize = 5;

/// Why a call failed.
#[derive(Debug)]
pub enum Error {
    /// The service refused: status code and message.
    Refused(u32, String),
    /// The connection failed, or what came was no answer.
    Broken(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(code, message) => write!(f, "refused (code {code}): {message}"),
            Self::Broken(why) => write!(f, "the call broke: {why}"),
        }
    }
}

fn broken(e: impl std::fmt::Display) -> Error {
    Error::Broken(e.to_string())
}

/// Calls `method` of `service`.
///
/// # Errors
/// See [`Error`].
pub fn call<A: Message>(
    socket: &Path,
    service: &str,
    method: &str,
    request: &impl Message,
    limit: Duration,
) -> Result<A, Error> {
    let message = request.write_to_bytes().map_err(broken)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(broken)?;
    let answer = runtime.block_on(async {
        let path = format!("/{service}/{method}");
        let called = exchange(socket, &path, &message);
        match tokio::time::timeout(limit, called).await {
            Ok(answer) => answer,
            Err(_) => Err(broken(format!("no answer to {method} within {limit:?}"))),
        }
    })?;
    A::parse_from_bytes(&answer).map_err(broken)
}

async fn exchange(socket: &Path, path: &str, message: &[u8]) -> Result<Vec<u8>, Error> {
    let stream = UnixStream::connect(socket).await.map_err(broken)?;
    let (client, connection) = client::handshake(stream).await.map_err(broken)?;
    tokio::spawn(async move {
        // Ends with the call.
        let _ = connection.await;
    });
    let request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(broken)?;
    let mut client = client.ready().await.map_err(broken)?;
    let (response, mut body) = client.send_request(request, false).map_err(broken)?;
    let len = u32::try_from(message.len()).map_err(broken)?;
    let frame = [&[0][..], &len.to_be_bytes(), message].concat();
    body.send_data(frame.into(), true).map_err(broken)?;
    let response = response.await.map_err(broken)?;
    let headers = response.headers().clone();
    let mut body = response.into_body();
    let mut data = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece.map_err(broken)?;
        data.extend_from_slice(&piece);
        if data.len() > MAX_ANSWER {
            return Err(broken("the answer is too long"));
        }
        body.flow_control().release_capacity(piece.len()).map_err(broken)?;
    }
    // A refusal may come without a body, and then in the headers.
    let trailers = body.trailers().await.map_err(broken)?.unwrap_or(headers);
    let text = |name: &str| trailers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    match text("grpc-status").parse() {
        Ok(0) => {}
        Ok(code) => return Err(Error::Refused(code, text("grpc-message").to_owned())),
        Err(_) => return Err(broken("the answer has no status")),
    }
    let whole = || broken(io::Error::from(io::ErrorKind::UnexpectedEof));
    let prefix: [u8; PREFIX] =
        data.get(..PREFIX).and_then(|p| p.try_into().ok()).ok_or_else(whole)?;
    let [compressed, len @ ..] = prefix;
    let len = usize::try_from(u32::from_be_bytes(len)).map_err(broken)?;
    if compressed != 0 || data.len() != PREFIX + len {
        return Err(whole());
    }
    Ok(data.split_off(PREFIX))
}
