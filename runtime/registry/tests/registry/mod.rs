//! A registry in this process that can be as wrong as a test needs it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use mvm_image::Digest;
use serde_json::json;

/// How the next answers to requests for a blob come out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// The connection ends after so many bytes, this often.
    Cut { after: usize, times: usize },
    /// Ranges are ignored, and the connection ends after so many bytes the first time.
    NoRanges { after: usize },
    /// Other bytes, as many as there should be.
    Damaged,
    /// More bytes than were stated in the manifest.
    Long,
    /// The server fails this often.
    Unavailable { times: usize },
}

#[derive(Debug, Default)]
pub struct Behaviour {
    pub fault: Fault,
    /// A token is wanted, which anybody gets.
    pub token: bool,
    /// A login is wanted.
    pub login: bool,
    /// Requests, as `PATH` or `PATH RANGE`.
    pub asked: Vec<String>,
}

pub struct Registry {
    address: String,
    documents: Arc<Mutex<HashMap<String, Vec<u8>>>>,
    pub behaviour: Arc<Mutex<Behaviour>>,
}

const REPOSITORY: &str = "team/app";

impl Registry {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let registry = Self { address, documents: Arc::default(), behaviour: Arc::default() };
        let (documents, behaviour) = (registry.documents.clone(), registry.behaviour.clone());
        let address = registry.address.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (documents, behaviour) = (documents.clone(), behaviour.clone());
                let address = address.clone();
                std::thread::spawn(move || serve(stream, &address, &documents, &behaviour));
            }
        });
        registry
    }

    /// The full name of the image `tag`.
    pub fn name(&self, tag: &str) -> mvm_image::Reference {
        format!("{}/{REPOSITORY}:{tag}", self.address).parse().unwrap()
    }

    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().unwrap());
    }

    /// Requests since the last call, blobs only.
    pub fn blobs_asked(&self) -> Vec<String> {
        let asked = std::mem::take(&mut self.behaviour.lock().unwrap().asked);
        asked.into_iter().filter(|path| path.contains("/blobs/")).collect()
    }

    pub fn put(&self, kind: &str, name: &str, bytes: &[u8]) {
        let path = format!("/v2/{REPOSITORY}/{kind}/{name}");
        self.documents.lock().unwrap().insert(path, bytes.to_vec());
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = Digest::of(bytes).to_string();
        self.put("blobs", &digest, bytes);
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// Puts a manifest of an image whose only file is `/content` there, and returns its descriptor.
    pub fn image(
        &self,
        tag: Option<&str>,
        architecture: &str,
        content: &[u8],
    ) -> serde_json::Value {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, "content", content).unwrap();
        let layer = archive.into_inner().unwrap();
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["/content"]},
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
        });
        let layer = self.blob("application/vnd.oci.image.layer.v1.tar", &layer);
        let config = serde_json::to_vec(&config).unwrap();
        let config = self.blob("application/vnd.oci.image.config.v1+json", &config);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
        });
        self.document(tag, MANIFEST, &manifest)
    }

    /// Puts a manifest or index there, by its digest and as `tag`.
    pub fn document(
        &self,
        tag: Option<&str>,
        media_type: &str,
        document: &serde_json::Value,
    ) -> serde_json::Value {
        let bytes = serde_json::to_vec(document).unwrap();
        let digest = Digest::of(&bytes).to_string();
        self.put("manifests", &digest, &bytes);
        if let Some(tag) = tag {
            self.put("manifests", tag, &bytes);
        }
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }
}

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn serve(
    mut stream: TcpStream,
    address: &str,
    documents: &Mutex<HashMap<String, Vec<u8>>>,
    behaviour: &Mutex<Behaviour>,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next().and_then(Result::ok).unwrap_or_default();
    if !first.starts_with("GET ") {
        return;
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let headers: HashMap<String, String> = lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (key, value) = line.split_once(": ")?;
            Some((key.to_lowercase(), value.to_owned()))
        })
        .collect();
    // Who hangs up early is part of the tests.
    let _ = answer(&mut stream, &path, &headers, address, documents, behaviour);
}

fn answer(
    stream: &mut TcpStream,
    path: &str,
    headers: &HashMap<String, String>,
    address: &str,
    documents: &Mutex<HashMap<String, Vec<u8>>>,
    behaviour: &Mutex<Behaviour>,
) -> std::io::Result<()> {
    if path.starts_with("/token?") {
        return reply(stream, "200 OK", &[], br#"{"token": "for-anybody"}"#);
    }
    let mut behaviour = behaviour.lock().unwrap();
    let authorization = headers.get("authorization").map_or("", String::as_str);
    let challenge = match (behaviour.token, behaviour.login) {
        (true, _) if authorization != "Bearer for-anybody" => {
            Some(format!("Bearer realm=\"http://{address}/token\",service=\"test\""))
        }
        (_, true) if authorization.is_empty() => Some("Basic realm=\"test\"".to_owned()),
        _ => None,
    };
    if let Some(challenge) = challenge {
        let body = br#"{"errors": [{"code": "UNAUTHORIZED", "message": "who is there?"}]}"#;
        let header = format!("WWW-Authenticate: {challenge}");
        return reply(stream, "401 Unauthorized", &[&header], body);
    }
    if path == "/v2/" {
        return reply(stream, "200 OK", &[], b"{}");
    }
    let range = headers.get("range").cloned();
    behaviour.asked.push(match &range {
        Some(range) => format!("{path} {range}"),
        None => path.to_owned(),
    });
    let Some(mut bytes) = documents.lock().unwrap().get(path).cloned() else {
        let body = br#"{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such thing"}]}"#;
        return reply(stream, "404 Not Found", &[], body);
    };
    if !path.contains("/blobs/") {
        let digest = format!("Docker-Content-Digest: {}", Digest::of(&bytes));
        return reply(stream, "200 OK", &[&digest, &format!("Content-Type: {MANIFEST}")], &bytes);
    }
    let mut sent = None;
    let mut ranges = true;
    match &mut behaviour.fault {
        Fault::None => {}
        Fault::Cut { times: 0, .. } | Fault::Unavailable { times: 0 } => {}
        Fault::Cut { after, times } => {
            *times -= 1;
            sent = Some(*after);
        }
        Fault::NoRanges { after } => {
            sent = Some(std::mem::replace(after, usize::MAX));
            ranges = false;
        }
        Fault::Damaged => bytes.iter_mut().for_each(|byte| *byte ^= 1),
        Fault::Long => bytes.extend(b"and more"),
        Fault::Unavailable { times } => {
            *times -= 1;
            return reply(stream, "503 Service Unavailable", &[], b"later");
        }
    }
    drop(behaviour);
    let from = range
        .filter(|_| ranges)
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let (status, body) = match from {
        Some(from) => ("206 Partial Content", &bytes[from..]),
        None => ("200 OK", &bytes[..]),
    };
    let sent = sent.unwrap_or(body.len()).min(body.len());
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(&body[..sent])
}

fn reply(
    stream: &mut TcpStream,
    status: &str,
    headers: &[&str],
    body: &[u8],
) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len())?;
    for header in headers {
        write!(stream, "{header}\r\n")?;
    }
    write!(stream, "Connection: close\r\n\r\n")?;
    stream.write_all(body)
}
