//! The methods of the service, once, for both sides.

use std::time::Duration;

use protobuf::Message;
use ttrpc::Code;

#[allow(clippy::wildcard_imports)] // The service names nearly every message.
use crate::messages::*;

use super::client::{CallError, Client};
use super::server::Status;

macro_rules! service {
    ($($(#[$doc:meta])* $name:literal $method:ident($request:ident) -> $response:ident;)*) => {
        /// The agent's service, as the guest implements it. `agent.proto` says what each call does.
        pub trait Agent: Send + Sync {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// A [`Status`], which the caller receives.
                fn $method(&self, request: $request) -> Result<$response, Status>;
            )*
        }

        /// Calls the method `name` of `agent` with an encoded request.
        pub(super) fn dispatch(
            agent: &dyn Agent,
            name: &str,
            payload: &[u8],
        ) -> Result<Vec<u8>, Status> {
            let malformed = |e| Status::new(Code::INVALID_ARGUMENT, format!("{name}: malformed request: {e}"));
            let unencodable = |e| Status::new(Code::INTERNAL, format!("{name}: cannot encode the response: {e}"));
            match name {
                $(
                    $name => {
                        let request = $request::parse_from_bytes(payload).map_err(malformed)?;
                        agent.$method(request)?.write_to_bytes().map_err(unencodable)
                    }
                )*
                _ => Err(Status::new(Code::UNIMPLEMENTED, format!("no method {name:?} in this agent"))),
            }
        }

        /// The calls. Each fails with [`CallError::Timeout`] after `timeout`.
        #[allow(clippy::missing_errors_doc)] // One error type, which documents itself.
        impl Client {
            $(
                $(#[$doc])*
                pub fn $method(&self, request: &$request, timeout: Duration) -> Result<$response, CallError> {
                    self.call($name, request, timeout)
                }
            )*
        }
    };
}

service! {
    /// Sets the guest's clock.
    "SetClock" set_clock(SetClockRequest) -> Empty;
    /// Adds entropy to the guest's random number generator.
    "ReseedRandom" reseed_random(ReseedRandomRequest) -> Empty;
    /// Memory, uptime and the kernel log's end.
    "GuestInfo" guest_info(GuestInfoRequest) -> GuestInfoResponse;
    /// Ends all processes and the VM. The answer may not arrive any more.
    "Shutdown" shutdown(ShutdownRequest) -> Empty;
    /// Sets up a container and its first process, up to just before the program is executed.
    "CreateContainer" create_container(CreateContainerRequest) -> CreateContainerResponse;
    /// Sets up a further process, up to just before the program is executed.
    "ExecProcess" exec_process(ExecProcessRequest) -> ExecProcessResponse;
    /// Executes the program of a process that was set up.
    "StartProcess" start_process(StartProcessRequest) -> StartProcessResponse;
    /// Waits for a process's end, bounded; give `timeout` some seconds more than the request has.
    "WaitProcess" wait_process(WaitProcessRequest) -> WaitProcessResponse;
    /// Sends a signal.
    "SignalProcess" signal_process(SignalProcessRequest) -> Empty;
    /// Sets the terminal's size.
    "ResizeTerminal" resize_terminal(ResizeTerminalRequest) -> Empty;
    /// Ends the standard input.
    "CloseStdin" close_stdin(CloseStdinRequest) -> Empty;
    /// Forgets an exec'ed process that has ended.
    "DeleteProcess" delete_process(DeleteProcessRequest) -> Empty;
    /// Takes a container down and forgets it.
    "DeleteContainer" delete_container(DeleteContainerRequest) -> Empty;
    /// All containers.
    "ListContainers" list_containers(Empty) -> ListContainersResponse;
    /// The processes in a container.
    "ListProcesses" list_processes(ListProcessesRequest) -> ListProcessesResponse;
    /// Changes control-group limits.
    "UpdateResources" update_resources(UpdateResourcesRequest) -> UpdateResourcesResponse;
    /// Freezes a container's processes.
    "PauseContainer" pause_container(PauseContainerRequest) -> Empty;
    /// Thaws them.
    "ResumeContainer" resume_container(ResumeContainerRequest) -> Empty;
    /// Control-group figures.
    "Stats" stats(StatsRequest) -> StatsResponse;
    /// Gives the guest's network devices their addresses and routes.
    "ConfigureNetwork" configure_network(ConfigureNetworkRequest) -> Empty;
    /// Makes a disk the guest's that the host has put into a place.
    "PlugDisk" plug_disk(DiskRequest) -> Empty;
    /// Lets go of a disk, before the host takes it out of its place.
    "UnplugDisk" unplug_disk(DiskRequest) -> Empty;
    /// Adds a file system to the kernel, or only says whether it is there.
    "AddFileSystem" add_file_system(AddFileSystemRequest) -> AddFileSystemResponse;
}
