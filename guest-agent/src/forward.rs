//! TCP connections to the guest's loopback on behalf of the host: what `kubectl port-forward` dials in
//! the pod's network namespace there is to reach who listens here.

use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mvm_agent_protocol::relay::relay;
use mvm_agent_protocol::stream::Answer;

/// How long whoever listens may take to accept: nobody is further away than this guest.
const ACCEPT: Duration = Duration::from_secs(10);

/// Dials `port` for `host`, answers, and copies both ways until the connection has ended.
///
/// # Errors
/// `host` cannot be answered, or the guest has no thread for it.
pub fn serve(port: u16, mut host: UnixStream) -> io::Result<()> {
    let Ok(program) = dial(port) else {
        return host.write_all(&[Answer::NotFound as u8]);
    };
    host.write_all(&[Answer::Attached as u8])?;
    // The type only owns the descriptor.
    relay(&host, &UnixStream::from(OwnedFd::from(program)))
}

/// IPv4 first, as those do who dial `localhost`.
fn dial(port: u16) -> io::Result<TcpStream> {
    let connect = |address: SocketAddr| TcpStream::connect_timeout(&address, ACCEPT);
    connect((Ipv4Addr::LOCALHOST, port).into())
        .or_else(|_| connect((Ipv6Addr::LOCALHOST, port).into()))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{Shutdown, TcpListener};

    use super::*;

    fn ask(port: u16) -> (UnixStream, std::thread::JoinHandle<()>) {
        let (host, agent) = UnixStream::pair().unwrap();
        (host, std::thread::spawn(move || serve(port, agent).unwrap()))
    }

    #[test]
    fn who_listens_on_either_loopback_is_reached() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                eprintln!("\n*** SKIPPED: {address} is not to be had here ***\n");
                continue;
            };
            let (mut host, thread) = ask(listener.local_addr().unwrap().port());
            let (mut program, _) = listener.accept().unwrap();
            host.write_all(b"ask").unwrap();
            host.shutdown(Shutdown::Write).unwrap();
            let mut text = String::new();
            program.read_to_string(&mut text).unwrap();
            program.write_all(b"answer").unwrap();
            drop(program);
            let mut answer = Vec::new();
            host.read_to_end(&mut answer).unwrap();
            assert_eq!((text.as_str(), &answer[..]), ("ask", &b"\0answer"[..]));
            thread.join().unwrap();
        }
    }

    #[test]
    fn where_nobody_listens_the_answer_says_so() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (mut host, thread) = ask(free);
        let mut answer = Vec::new();
        host.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, [Answer::NotFound as u8]);
        thread.join().unwrap();
    }
}
