//! Client and server over a socket pair, and the server against the ttrpc crate's own client.
#![allow(missing_docs)]

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use mvm_agent_protocol::SERVICE;
use mvm_agent_protocol::messages::*;
use mvm_agent_protocol::rpc::{Agent, CallError, Client, Code, Status, serve};
use protobuf::Message;

const SOON: Duration = Duration::from_secs(10);

/// Waits block until the gate opens; info answers at once; everything else is refused.
#[derive(Default)]
struct Fake {
    open: Mutex<bool>,
    opened: Condvar,
}

macro_rules! refuse {
    ($($method:ident($request:ident) -> $response:ident;)*) => {$(
        fn $method(&self, _: $request) -> Result<$response, Status> {
            Err(Status::new(Code::FAILED_PRECONDITION, stringify!($method)))
        }
    )*};
}

impl Agent for Fake {
    fn guest_info(&self, request: GuestInfoRequest) -> Result<GuestInfoResponse, Status> {
        let dmesg_tail = "x".repeat(request.dmesg_tail_bytes as usize);
        Ok(GuestInfoResponse { dmesg_tail, uptime_ns: 5, ..Default::default() })
    }
    fn wait_process(&self, request: WaitProcessRequest) -> Result<WaitProcessResponse, Status> {
        let guard = self.open.lock().unwrap();
        drop(self.opened.wait_while(guard, |open| !*open).unwrap());
        Ok(WaitProcessResponse { exit_code: request.timeout_ms, ..Default::default() })
    }
    refuse! {
        set_clock(SetClockRequest) -> Empty;
        reseed_random(ReseedRandomRequest) -> Empty;
        shutdown(ShutdownRequest) -> Empty;
        create_container(CreateContainerRequest) -> CreateContainerResponse;
        exec_process(ExecProcessRequest) -> ExecProcessResponse;
        start_process(StartProcessRequest) -> StartProcessResponse;
        signal_process(SignalProcessRequest) -> Empty;
        resize_terminal(ResizeTerminalRequest) -> Empty;
        close_stdin(CloseStdinRequest) -> Empty;
        delete_process(DeleteProcessRequest) -> Empty;
        delete_container(DeleteContainerRequest) -> Empty;
        list_containers(Empty) -> ListContainersResponse;
        list_processes(ListProcessesRequest) -> ListProcessesResponse;
        update_resources(UpdateResourcesRequest) -> UpdateResourcesResponse;
        pause_container(PauseContainerRequest) -> Empty;
        resume_container(ResumeContainerRequest) -> Empty;
        stats(StatsRequest) -> StatsResponse;
        configure_network(ConfigureNetworkRequest) -> Empty;
        plug_disk(DiskRequest) -> Empty;
        unplug_disk(DiskRequest) -> Empty;
        add_file_system(AddFileSystemRequest) -> AddFileSystemResponse;
    }
}

fn serve_fake() -> (UnixStream, Arc<Fake>, std::thread::JoinHandle<std::io::Result<()>>) {
    let (client, server) = UnixStream::pair().unwrap();
    let fake = Arc::new(Fake::default());
    let agent: Arc<dyn Agent> = Arc::<Fake>::clone(&fake);
    (client, fake, std::thread::spawn(move || serve(server, &agent)))
}

#[test]
fn blocked_waits_do_not_hold_up_other_calls() {
    let (stream, fake, _) = serve_fake();
    let client = Client::new(stream).unwrap();
    let waits: Vec<_> = (0..100)
        .map(|i| {
            let client = client.clone();
            let request = WaitProcessRequest { timeout_ms: i, ..Default::default() };
            std::thread::spawn(move || client.wait_process(&request, SOON).unwrap().exit_code)
        })
        .collect();
    let info = client.guest_info(&GuestInfoRequest::default(), SOON).unwrap();
    assert_eq!(info.uptime_ns, 5);
    *fake.open.lock().unwrap() = true;
    fake.opened.notify_all();
    for (i, wait) in waits.into_iter().enumerate() {
        assert_eq!(wait.join().unwrap() as usize, i, "each call gets its own answer");
    }
}

#[test]
fn refusal_carries_code_and_message() {
    let (stream, _, _) = serve_fake();
    let error = Client::new(stream).unwrap().set_clock(&SetClockRequest::default(), SOON);
    let error = error.unwrap_err();
    assert_eq!(error.code(), Some(Code::FAILED_PRECONDITION));
    assert!(error.to_string().contains("set_clock"), "{error}");
}

#[test]
fn call_without_answer_times_out_and_the_connection_stays_usable() {
    let (stream, _, _) = serve_fake();
    let client = Client::new(stream).unwrap();
    let short = Duration::from_millis(50);
    let error = client.wait_process(&WaitProcessRequest::default(), short).unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error}");
    client.guest_info(&GuestInfoRequest::default(), SOON).unwrap();
}

#[test]
fn a_request_that_nobody_reads_times_out_and_ends_the_connection() {
    // More than the socket holds.
    let (stream, _deaf) = UnixStream::pair().unwrap();
    let client = Client::new(stream).unwrap();
    let request = AddFileSystemRequest { module: vec![0; 3 << 20], ..Default::default() };
    let error = client.add_file_system(&request, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error}");
    let later = client.guest_info(&GuestInfoRequest::default(), SOON);
    assert!(matches!(later, Err(CallError::Closed { .. })));
}

#[test]
fn end_of_the_connection_ends_waiting_and_later_calls_at_once() {
    let (client, server) = UnixStream::pair().unwrap();
    let client = Client::new(client).unwrap();
    let begun = Instant::now();
    let waiter = {
        let client = client.clone();
        std::thread::spawn(move || client.guest_info(&GuestInfoRequest::default(), SOON))
    };
    std::thread::sleep(Duration::from_millis(20));
    drop(server);
    assert!(matches!(waiter.join().unwrap(), Err(CallError::Closed { .. })));
    let later = client.guest_info(&GuestInfoRequest::default(), SOON);
    assert!(matches!(later, Err(CallError::Closed { .. })));
    assert!(begun.elapsed() < SOON);
}

#[test]
fn dropping_the_client_ends_the_server() {
    let (stream, _, server) = serve_fake();
    drop(Client::new(stream).unwrap());
    server.join().unwrap().unwrap();
}

#[test]
fn answer_beyond_the_message_limit_does_not_break_the_server() {
    let (stream, _, _) = serve_fake();
    let client = Client::new(stream).unwrap();
    let request = GuestInfoRequest { dmesg_tail_bytes: 5 << 20, ..Default::default() };
    let error = client.guest_info(&request, SOON).unwrap_err();
    assert_eq!(error.code(), Some(Code::RESOURCE_EXHAUSTED), "{error}");
    client.guest_info(&GuestInfoRequest::default(), SOON).unwrap();
}

#[test]
fn garbage_ends_the_connection_with_an_error() {
    use std::io::Write;
    let (mut stream, _, server) = serve_fake();
    stream.write_all(&[0xff; 64]).unwrap();
    assert!(server.join().unwrap().is_err());
}

#[test]
fn the_ttrpc_crates_client_understands_this_server() {
    let (stream, _, _) = serve_fake();
    let client = ttrpc::Client::new(stream.into_raw_fd()).unwrap();
    let call = |method: &str| {
        let mut request = ttrpc::Request::new();
        request.service = SERVICE.into();
        request.method = method.into();
        request.timeout_nano = 10_000_000_000;
        client.request(request)
    };
    let answer = call("GuestInfo").unwrap();
    assert_eq!(GuestInfoResponse::parse_from_bytes(&answer.payload).unwrap().uptime_ns, 5);
    for (method, code) in [("Stats", Code::FAILED_PRECONDITION), ("Nothing", Code::UNIMPLEMENTED)] {
        match call(method) {
            Err(ttrpc::Error::RpcStatus(status)) => assert_eq!(status.code(), code, "{method}"),
            other => panic!("{method}: {other:?}"),
        }
    }
}
