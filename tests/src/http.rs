//! Asking a web server, from within a network namespace.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use mvm_net::Namespace;

/// How long a server may take for one step.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a server says to `GET PATH`, its headers left out. The host's programs are of no use here: not each
/// host has one, and some that there are fail for reasons of their own.
///
/// # Errors
/// Nobody answers there, or not with the page.
///
/// # Panics
/// If the namespace cannot be entered.
pub fn get(namespace: &Namespace, server: SocketAddr, path: &str) -> io::Result<String> {
    let connect = || TcpStream::connect_timeout(&server, PATIENCE);
    let mut stream = namespace.enter(connect).expect("a namespace to enter")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let failed = || io::Error::other(format!("{server} answers {answer:?}"));
    let (head, page) = answer.split_once("\r\n\r\n").ok_or_else(failed)?;
    let is_page = head.split(' ').nth(1) == Some("200");
    if is_page { Ok(page.to_owned()) } else { Err(failed()) }
}
