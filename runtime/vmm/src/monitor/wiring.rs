//! From config and descriptors to the parts of a machine.

use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use super::dial;
use super::fds::FdTable;
use super::process::Error;
use crate::config::{ImageSource, MachineConfig};
use crate::machine::{Disk, Module, NetCard, Parts, Section, SharedFiles, Sockets, VirtioConsole};

/// Takes the descriptors that `config` names and makes the machine's parts from them.
pub(super) fn parts(config: &MachineConfig, fds: &mut FdTable) -> Result<Parts, Error> {
    let kernel = section(&config.kernel, "the kernel", fds)?;
    let mut parts = Parts::new(config.memory, kernel);
    parts.vcpus = config.vcpus;
    parts.memory_max = config.memory_max;
    parts.hugepages = config.hugepages;
    parts.boot = config.boot;
    parts.cmdline_style = config.cmdline_style;
    parts.exit_status = config.exit_status;
    parts.cpu = config.cpu;
    parts.initramfs = match &config.initramfs {
        Some(source) => Some(section(source, "the initramfs", fds)?),
        None => None,
    };
    for module in &config.modules {
        let content = section(&module.content, "a module", fds)?;
        parts.modules.push(Module { content, text: module.text.clone() });
    }
    parts.cmdline.clone_from(&config.cmdline);
    parts.verbose = config.verbose;
    for disk in &config.disks {
        parts.disks.push(Disk {
            file: Some(File::from(fds.take(disk.fd)?)),
            read_only: disk.read_only,
            serial: disk.serial.clone(),
        });
    }
    for slot in 0..config.disk_slots {
        let serial = format!("slot{slot}");
        parts.disks.push(Disk { file: None, read_only: false, serial });
    }
    for net in &config.nets {
        let queues = net.queues.iter().map(|&index| fds.take(index));
        let queues = queues.collect::<Result<_, _>>()?;
        parts.nets.push(NetCard { queues, mac: net.mac, mtu: net.mtu });
    }
    if let Some(vsock) = &config.vsock {
        let listener = vsock.listener.map(|index| fds.take(index)).transpose()?;
        let mut sockets = Sockets {
            cid: vsock.cid,
            listener: listener.map(UnixListener::from),
            guest_ports: Vec::new(),
            dialer: None,
        };
        for port in &vsock.guest_ports {
            sockets.guest_ports.push((port.port, UnixStream::from(fds.take(port.stream)?)));
        }
        if let Some(dial) = &vsock.dial {
            let directory = fds.take(dial.directory)?;
            sockets.dialer = Some(dial::dialer(directory, dial.name.clone()));
        }
        parts.vsock = Some(sockets);
    }
    if let Some(log) = config.console.log {
        parts.console = Box::new(File::from(fds.take(log)?));
    }
    parts.console_ring = config.console.ring as usize;
    parts.console_input = config.console.input.map(|index| fds.take(index)).transpose()?;
    if let Some(console) = &config.virtio_console {
        parts.virtio_console = Some(VirtioConsole {
            output: console.output.map(|index| fds.take(index)).transpose()?,
            input: console.input.map(|index| fds.take(index)).transpose()?,
        });
    }
    if let Some(fs) = &config.fs {
        let channel = fds.take(fs.channel)?;
        parts.fs = Some(SharedFiles { tag: fs.tag.clone(), channel });
    }
    Ok(parts)
}

fn section(source: &ImageSource, what: &str, fds: &mut FdTable) -> Result<Section, Error> {
    let file = File::from(fds.take(source.fd)?);
    let failed = |source: io::Error| Error::Descriptor { what: what.into(), source };
    Section::new(file, source.offset, source.len).map_err(failed)
}
