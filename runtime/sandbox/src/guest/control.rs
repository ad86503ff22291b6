//! What is done to a whole container in the guest.

use mvm_agent_protocol::messages::container_state::Status;
use mvm_agent_protocol::messages::{
    AddFileSystemRequest, CloseStdinRequest, DeleteContainerRequest, DiskRequest, Empty,
    PauseContainerRequest, ResumeContainerRequest, ShutdownRequest, SignalProcessRequest,
    UpdateResourcesRequest,
};

use super::{Guest, refused_setup};
use crate::error::Error;

impl Guest {
    /// Sends a signal to every process of the container.
    pub fn signal_all(&self, signal: i32) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: self.container.clone(),
            signal: signal.unsigned_abs(),
            all: true,
            ..Default::default()
        };
        self.client.signal_process(&request, self.limit)?;
        Ok(())
    }

    /// Freezes the container's processes; the machine goes on.
    pub fn freeze(&self) -> Result<(), Error> {
        let container_id = self.container.clone();
        let request = PauseContainerRequest { container_id, ..Default::default() };
        self.client.pause_container(&request, self.limit)?;
        Ok(())
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<(), Error> {
        let container_id = self.container.clone();
        let request = ResumeContainerRequest { container_id, ..Default::default() };
        self.client.resume_container(&request, self.limit)?;
        Ok(())
    }

    /// Changes the container's limits; `resources` is the runtime specification's
    /// `linux.resources` in JSON. Returns what the guest will not honour.
    pub fn update(&self, resources: &[u8]) -> Result<Vec<String>, Error> {
        let request = UpdateResourcesRequest {
            container_id: self.container.clone(),
            resources_json: resources.to_vec(),
            ..Default::default()
        };
        Ok(self.client.update_resources(&request, self.limit)?.notices)
    }

    /// The containers that run in the guest, whatever their ids.
    pub fn containers(&self) -> Result<Vec<String>, Error> {
        let list = self.client.list_containers(&Empty::new(), self.limit)?;
        let runs = |status: Status| matches!(status, Status::RUNNING | Status::PAUSED);
        let running = list.containers.into_iter();
        let running = running.filter(|one| one.status.enum_value().is_ok_and(runs));
        Ok(running.map(|one| one.id).collect())
    }

    /// Ends what still runs of the container, and forgets it.
    pub fn remove(&self) -> Result<(), Error> {
        let container_id = self.container.clone();
        let request = DeleteContainerRequest { container_id, force: true, ..Default::default() };
        self.client.delete_container(&request, self.limit)?;
        Ok(())
    }

    /// Ends everything that runs, writes out what is in memory, and ends the machine, a moment after this
    /// returns.
    pub fn shut_down(&self) -> Result<(), Error> {
        self.client.shutdown(&ShutdownRequest::new(), self.limit)?;
        Ok(())
    }

    /// Makes the disk the guest's that the machine has got at `place`.
    pub fn plug(&self, place: u32) -> Result<(), Error> {
        self.client.plug_disk(&DiskRequest { place, ..Default::default() }, self.limit)?;
        Ok(())
    }

    /// Has the guest write out, and let go of, the disk at `place`.
    pub fn unplug(&self, place: u32) -> Result<(), Error> {
        self.client.unplug_disk(&DiskRequest { place, ..Default::default() }, self.limit)?;
        Ok(())
    }

    /// Has the guest's kernel know file systems of the type `kind`. `module`, of the same kernel, is sent and loaded if it
    /// does not yet; it has to fit into a message of 4 MiB.
    pub fn add_file_system(&self, kind: &str, module: &[u8]) -> Result<(), Error> {
        let ask = |module: &[u8]| {
            let (fs_type, module) = (kind.to_owned(), module.to_owned());
            let request = AddFileSystemRequest { fs_type, module, ..Default::default() };
            let added = self.client.add_file_system(&request, self.limit);
            added.map(|answer| answer.there).map_err(refused_setup)
        };
        if !ask(&[])? {
            ask(module)?;
        }
        Ok(())
    }

    /// Ends a process's standard input even while somebody writes to it.
    pub fn close_stdin(&self, process: &str) -> Result<(), Error> {
        let request = CloseStdinRequest {
            container_id: self.container.clone(),
            process_id: process.to_owned(),
            ..Default::default()
        };
        self.client.close_stdin(&request, self.limit)?;
        Ok(())
    }
}
