//! `bpf(2)`, as far as it is needed, and a listening socket for both families.

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt::set_ipv6_v6only,
};

use super::program::Instruction;

// Commands and types of linux/bpf.h.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// The helpers that the program calls are there for programs of any licence; the kernel wants to be told one.
const LICENCE: &CStr = c"Apache-2.0";

/// How many connections wait to be accepted.
const BACKLOG: i32 = 128;

/// A part of `union bpf_attr` that is all numbers, without padding.
///
/// # Safety
/// Every address in it is that of memory which the command may read, for as long as the value lives.
unsafe trait Attribute: Copy {}

#[derive(Clone, Copy)]
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MapUpdate {
    map: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

// SAFETY: there is no address in it.
unsafe impl Attribute for MapCreate {}
// SAFETY: `put` keeps key and value until the call has returned.
unsafe impl Attribute for MapUpdate {}
// SAFETY: `load` keeps instructions and licence until the call has returned; there is no log.
unsafe impl Attribute for ProgramLoad {}
// SAFETY: there is no address in it.
unsafe impl Attribute for LinkCreate {}

fn bpf(command: libc::c_int, attribute: &impl Attribute) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads as many bytes as it is told are there; what addresses among them name
    // may be read, by the contract of `Attribute`.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of_val(attribute))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn bpf_descriptor(command: libc::c_int, attribute: &impl Attribute) -> io::Result<OwnedFd> {
    let fd = bpf(command, attribute)?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: the command has made this descriptor a moment ago, for us alone. Such descriptors are
    // closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn address<T>(of: *const T) -> u64 {
    of.addr() as u64
}

/// A map with a place for one socket.
pub fn socket_map() -> io::Result<OwnedFd> {
    let attribute = MapCreate {
        map_type: BPF_MAP_TYPE_SOCKMAP,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u64>() as u32,
        max_entries: 1,
    };
    bpf_descriptor(BPF_MAP_CREATE, &attribute)
}

/// Puts a socket into the map.
pub fn put(map: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (0_u32, u64::from(number(socket)));
    let attribute = MapUpdate {
        map: number(map),
        reserved: 0,
        key: address(&raw const key),
        value: address(&raw const value),
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attribute).map(drop)
}

/// Has the kernel check a program for `sk_lookup`, and take it.
pub fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(b"mvm_loopback") {
        *to = *from;
    }
    let attribute = ProgramLoad {
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: address(program.as_ptr()),
        licence: address(LICENCE.as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name,
        interface: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    bpf_descriptor(BPF_PROG_LOAD, &attribute)
}

/// Attaches a program to a network namespace, until the descriptor is closed.
pub fn attach(program: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attribute = LinkCreate {
        program: number(program),
        target: number(namespace),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    bpf_descriptor(BPF_LINK_CREATE, &attribute)
}

/// A socket that IPv4 reaches too, at a port of the kernel's choice.
pub fn listen_at_both() -> io::Result<TcpListener> {
    let fd = socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_ipv6_v6only(&fd, false)?;
    bind(&fd, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0))?;
    listen(&fd, BACKLOG)?;
    Ok(fd.into())
}
