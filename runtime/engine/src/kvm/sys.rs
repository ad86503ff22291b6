//! What has no safe form: memory shared with KVM, signals and timers of threads, and calls that kvm-ioctls
//! does not have or leaves unsafe.

use std::fs::File;
use std::io;
use std::mem::{offset_of, zeroed};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_device_attr,
    kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use mvm_memory::{PAGE_SIZE, RamRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, signal};

type KvmResult<T> = Result<T, kvm_ioctls::Error>;

/// KVM on an open device.
pub(crate) fn kvm_from(device: OwnedFd) -> Kvm {
    let file = File::from(device);
    // SAFETY: the descriptor is open, and from here on nobody else's.
    unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
}

/// Makes `part` of `region` (bytes from its start) memory slot `slot`, or changes whether writes to it are logged.
pub(crate) fn set_slot(
    vm: &VmFd,
    slot: u32,
    region: &RamRegion,
    part: Range<u64>,
    log: bool,
) -> KvmResult<()> {
    let end = part.end.min(region.size);
    let from = part.start.min(end);
    let region = kvm_userspace_memory_region {
        slot,
        flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.start + from,
        memory_size: end - from,
        userspace_addr: region.host as u64 + from,
    };
    // SAFETY: the range is in a mapping of this process that lives as long as the machine's `GuestRam`, which is
    // kept beside the descriptor; nothing but vm-memory's volatile accessors looks at it.
    unsafe { vm.set_user_memory_region(region) }
}

/// The first page of what a vCPU shares with KVM, mapped a second time so that it outlives nothing but
/// its own holder.
#[derive(Debug)]
pub(super) struct RunPage(NonNull<u8>);

// SAFETY: the mapping belongs to no thread, and is only touched through atomics.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice, of a descriptor that is open.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast()).map(Self).ok_or_else(|| io::Error::other("a mapping at zero"))
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: offsets are those of fields of `kvm_run`, which lie in the page; the kernel and other
        // mappings of the page may change it at any time, as atomics may.
        unsafe { AtomicU8::from_ptr(self.0.add(offset).as_ptr()) }
    }

    /// Makes KVM_RUN return at once.
    pub fn set_immediate_exit(&self, on: bool) {
        self.byte(offset_of!(kvm_run, immediate_exit)).store(on.into(), Ordering::SeqCst);
    }

    /// Has KVM_RUN return (KVM_EXIT_IRQ_WINDOW_OPEN) as soon as the vCPU takes interrupts that are not its local APIC's.
    pub fn request_interrupt_window(&self, on: bool) {
        let wanted = self.byte(offset_of!(kvm_run, request_interrupt_window));
        wanted.store(on.into(), Ordering::Relaxed);
    }

    /// Whether it does, as of the last KVM_RUN.
    pub fn takes_interrupts(&self) -> bool {
        let ready = self.byte(offset_of!(kvm_run, ready_for_interrupt_injection));
        ready.load(Ordering::Relaxed) != 0
    }

    /// Size in bytes of each access of a KVM_EXIT_IO.
    pub fn io_size(&self) -> usize {
        const SIZE: usize = offset_of!(kvm_run, __bindgen_anon_1)
            + offset_of!(kvm_run__bindgen_ty_1__bindgen_ty_4, size);
        self.byte(SIZE).load(Ordering::Relaxed).into()
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and references into it ended with the borrow of `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE_SIZE) };
    }
}

/// What KVM tells of a KVM_EXIT_INTERNAL_ERROR: suberror, and the bytes of the instruction that it could
/// not emulate, if it is about that.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    let run = vcpu.get_kvm_run();
    // SAFETY: the union is plain numbers, and this member is the one that belongs to the exit.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    (internal.suberror, internal.data[..count].to_vec())
}

/// KVM_EXIT_X86_* and others by number, for reports.
pub(super) fn exit_reason(vcpu: &mut VcpuFd) -> u32 {
    vcpu.get_kvm_run().exit_reason
}

/// Bytes that KVM_GET_XSAVE2 writes and KVM_SET_XSAVE reads on this machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct XsaveSize(usize);

impl XsaveSize {
    /// As the machine says (KVM_CAP_XSAVE2), 4096 if it does not know the question.
    pub fn of(vm: &VmFd) -> Self {
        let size = vm.check_extension_int(kvm_ioctls::Cap::Xsave2);
        Self(usize::try_from(size).unwrap_or(0).max(size_of::<kvm_xsave>()))
    }

    /// The size itself.
    pub fn bytes(self) -> usize {
        self.0
    }

    fn buffer(self) -> KvmResult<Xsave> {
        let extra = (self.0 - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
        Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))
    }

    /// The XSAVE area in the standard format.
    pub fn get(self, vcpu: &VcpuFd) -> KvmResult<Vec<u8>> {
        let mut buffer = self.buffer()?;
        if self.0 > size_of::<kvm_xsave>() {
            // SAFETY: the buffer has the size that the machine asks for; this process enables no further
            // features with arch_prctl, which is what could make it grow.
            unsafe { vcpu.get_xsave2(&mut buffer)? };
        } else {
            // SAFETY: the length of the flexible array member is not touched.
            unsafe { buffer.as_mut_fam_struct() }.xsave = vcpu.get_xsave()?;
        }
        let area = &buffer.as_fam_struct_ref().xsave;
        Ok(area
            .region
            .iter()
            .chain(buffer.as_slice())
            .flat_map(|word| word.to_le_bytes())
            .collect())
    }

    /// Takes over an area in the standard format; what `bytes` does not reach is zero.
    pub fn set(self, vcpu: &VcpuFd, bytes: &[u8]) -> KvmResult<()> {
        let mut buffer = self.buffer()?;
        let (head, tail) = bytes.split_at(bytes.len().min(size_of::<kvm_xsave>()));
        let word = |chunk: &[u8]| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        };
        // SAFETY: the length of the flexible array member is not touched.
        let region = unsafe { &mut buffer.as_mut_fam_struct().xsave.region };
        region.iter_mut().zip(head.chunks(4)).for_each(|(slot, chunk)| *slot = word(chunk));
        buffer.as_mut_slice().iter_mut().zip(tail.chunks(4)).for_each(|(slot, c)| *slot = word(c));
        // SAFETY: the buffer has the size that the machine asks for, as above.
        unsafe { vcpu.set_xsave2(&buffer) }
    }
}

// Linux, include/uapi/linux/kvm.h: device attributes of a vCPU.
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    }
}

/// Guest TSC minus host TSC.
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> KvmResult<u64> {
    let mut value = 0;
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: the attribute is a u64, which is what the address is of.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) } {
        0 => Ok(value),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// Sets guest TSC minus host TSC.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> KvmResult<()> {
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: as above; the call only reads it.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// Argument of KVM_SET_SIGNAL_MASK: `struct kvm_signal_mask`, with a set of the kernel's size
/// (Linux, Documentation/virt/kvm/api.rst, 4.20).
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    blocked: u64,
}

/// The head of it, whose size is in the number of the call.
#[repr(C)]
struct SignalMaskHead {
    len: u32,
}

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, SignalMaskHead);

/// Lets `signal` end KVM_RUN of this vCPU although the thread that runs it blocks it, and no other.
pub(crate) fn only_ended_by(vcpu: &VcpuFd, signal: i32) -> KvmResult<()> {
    let mask = SignalMask { len: size_of::<u64>() as u32, blocked: !(1 << (signal - 1)) };
    // SAFETY: the call reads `len` and as many bytes after it, which are all in `mask`.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// Enters KVM_RUN with a signal waiting, so that it returns before the guest runs an instruction, having brought
/// the vCPU's pending work into its state: an APIC timer that has expired while nobody ran becomes a request.
///
/// `immediate_exit` will not do: it returns before that work.
pub(super) fn settle(vcpu: &mut VcpuFd) -> io::Result<()> {
    let signal = kick_signal();
    let blocked = BlockedSignal::new(signal)?;
    only_ended_by(vcpu, signal)?;
    send_kick(this_thread());
    let run = vcpu.run().map(drop);
    // SAFETY: a null pointer takes the mask away.
    let restored = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK(), 0) };
    drop(blocked);
    if restored != 0 {
        return Err(io::Error::last_os_error());
    }
    match run {
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Ok(()),
        Err(e) => Err(e.into()),
        Ok(()) => Err(io::Error::other("KVM_RUN did not see the signal")),
    }
}

/// A signal held back in this thread, until dropped; one that waits then is taken without its handler.
struct BlockedSignal(libc::sigset_t, libc::sigset_t);

impl BlockedSignal {
    fn new(signal: i32) -> io::Result<Self> {
        // SAFETY: signal sets are plain data, written by the calls that get their addresses.
        unsafe {
            let (mut set, mut before) = (zeroed(), zeroed());
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, signal);
            match libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut before) {
                0 => Ok(Self(set, before)),
                e => Err(io::Error::from_raw_os_error(e)),
            }
        }
    }
}

impl Drop for BlockedSignal {
    fn drop(&mut self) {
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the sets were filled by `new`; the information about the signal is not asked for.
        unsafe {
            while libc::sigtimedwait(&self.0, std::ptr::null_mut(), &none) > 0 {}
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.1, std::ptr::null_mut());
        }
    }
}

/// The signal that interrupts a run.
fn kick_signal() -> i32 {
    // The first one is the probe's.
    signal::SIGRTMIN() + 1
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Gives [`kick_signal`] a handler that does nothing: interrupting is all it is for. Once for the process.
pub(super) fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: `sigaction` is plain data; the handler does nothing, so it may run at any time.
        let done = unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            // Device code on this thread need not know of it; KVM_RUN is not restarted.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

/// A thread of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ThreadId(libc::pid_t);

/// The calling thread.
pub(super) fn this_thread() -> ThreadId {
    // SAFETY: the call has no preconditions.
    ThreadId(unsafe { libc::gettid() })
}

/// Interrupts what `thread` waits for in the kernel.
pub(super) fn send_kick(thread: ThreadId) {
    // SAFETY: the call has no preconditions; a thread that is gone is an error that may be ignored.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.0, kick_signal()) };
}

/// Lets [`kick_signal`] through to this thread, whatever it inherited.
pub(super) fn unblock_kick() -> io::Result<()> {
    // SAFETY: the set is plain data, written by the calls that get its address.
    let error = unsafe {
        let mut set = zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// A timer that sends [`kick_signal`] to the thread that made it, again and again. One signal may come while the
/// thread is about to enter KVM_RUN and be lost; the next one will not.
#[derive(Debug)]
pub(super) struct ThreadTimer {
    timer: libc::timer_t,
    thread: ThreadId,
}

// SAFETY: a timer's handle may be used by any thread of the process.
unsafe impl Send for ThreadTimer {}

impl ThreadTimer {
    /// A timer for the calling thread, not set.
    pub fn new() -> io::Result<Self> {
        let thread = this_thread();
        // SAFETY: `sigevent` is plain data; the fields that SIGEV_THREAD_ID needs are set.
        let mut event: libc::sigevent = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        event.sigev_notify_thread_id = thread.0;
        let mut timer = std::ptr::null_mut();
        // SAFETY: both addresses are of local variables of the right types.
        match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } {
            0 => Ok(Self { timer, thread }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The thread that it is for.
    pub fn thread(&self) -> ThreadId {
        self.thread
    }

    /// Sends a signal every `interval` from now on; never, if it is zero.
    pub fn set(&self, interval: Duration) {
        let interval = libc::timespec {
            tv_sec: libc::time_t::try_from(interval.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: interval.subsec_nanos().into(),
        };
        let spec = libc::itimerspec { it_interval: interval, it_value: interval };
        // SAFETY: the timer is ours; the values are in range, so it cannot fail.
        unsafe { libc::timer_settime(self.timer, 0, &spec, std::ptr::null_mut()) };
    }
}

impl Drop for ThreadTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours, and not used after this.
        unsafe { libc::timer_delete(self.timer) };
    }
}
