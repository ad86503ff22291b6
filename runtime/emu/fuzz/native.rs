//! Runs cases on the host's own processor, in a child process, in batches.
//!
//! The child has the code and data pages at their fixed addresses. Each case ends with an exception (INT3
//! at the latest), whose signal handler has the registers in its frame: it copies them to the
//! shared result and makes the kernel return to the child's loop.

use std::arch::global_asm;
use std::ffi::c_void;
use std::io;
use std::mem::{size_of, zeroed};
use std::ptr::{addr_of, addr_of_mut};

use super::case::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, GS_BASE, HOLE, Outcome, READ_ONLY, State, XSAVE, fill,
};

/// Cases of a batch.
pub const BATCH: usize = 256;

#[repr(C)]
struct Shared {
    count: u64,
    /// Cases done, for finding the one that killed the child.
    done: u64,
    pad: [u64; 6],
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The child.
pub struct Native {
    shared: *mut Shared,
    child: libc::pid_t,
    to_child: i32,
    from_child: i32,
}

// SAFETY: the mapping and the descriptors belong to no thread.
unsafe impl Send for Native {}

global_asm!(
    ".pushsection .data, \"aw\"",
    ".p2align 4",
    "mvm_fuzz_rsp: .quad 0",
    "mvm_fuzz_target: .quad 0",
    "mvm_fuzz_guest_rsp: .quad 0",
    "mvm_fuzz_far: .long 0",
    ".word 0x23",
    ".popsection",
    // rdi: State, esi: 32-bit code. Loads everything and jumps.
    ".globl mvm_fuzz_run",
    "mvm_fuzz_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + mvm_fuzz_rsp], rsp",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [rdi + 192]",
    "mov rax, [rdi + 128]",
    "mov [rip + mvm_fuzz_far], eax",
    "test esi, esi",
    "jz 2f",
    "lea rax, [rip + 3f]",
    "2: mov [rip + mvm_fuzz_target], rax",
    "mov rax, [rdi + 32]",
    "mov [rip + mvm_fuzz_guest_rsp], rax",
    "push qword ptr [rdi + 136]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "mov rsp, [rip + mvm_fuzz_guest_rsp]",
    "jmp qword ptr [rip + mvm_fuzz_target]",
    // jmp far m16:32, which the assembler's dialects spell differently.
    "3: .byte 0xff, 0x2d",
    ".long mvm_fuzz_far - . - 4",
    ".globl mvm_fuzz_resume",
    "mvm_fuzz_resume:",
    "mov rsp, [rip + mvm_fuzz_rsp]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

const ITIMER_VIRTUAL: i32 = 1;

unsafe extern "C" {
    fn setitimer(which: i32, value: *const libc::itimerval, old: *mut libc::itimerval) -> i32;
}

unsafe extern "sysv64" {
    fn mvm_fuzz_run(state: *const State, compat: u32);
    fn mvm_fuzz_resume();
}

/// Where the handler puts what it finds. Only the child uses it, on one thread.
static mut RESULT: *mut Outcome = std::ptr::null_mut();
/// [`RESULT`] at the last tick of the child's clock.
static mut TICKED: *mut Outcome = std::ptr::null_mut();
/// [`Outcome::vector`] of a case that does not end.
pub const HUNG: u64 = 255;
/// [`Outcome::vector`] of a case that made a system call (it has rewritten itself): not to be compared.
pub const ESCAPED: u64 = 254;

extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a ucontext whose floating-point state is an XSAVE area; RESULT is
    // the outcome of the running case. Single-threaded child. Alignment checks go off first: AC may be set.
    unsafe {
        std::arch::asm!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq");
        let context = &mut *context.cast::<libc::ucontext_t>();
        let regs = &mut context.uc_mcontext.gregs;
        if signal == libc::SIGVTALRM {
            // A second of processor time is over. In the same case as at the last tick?
            let rip = regs[libc::REG_RIP as usize] as u64;
            let inside = (CODE..CODE + CODE_SIZE as u64).contains(&rip);
            if !inside || TICKED != RESULT {
                TICKED = RESULT;
                return;
            }
        }
        let out = &mut *RESULT;
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (to, from) in out.state.gpr.iter_mut().zip(order) {
            *to = regs[from as usize] as u64;
        }
        out.state.rip = regs[libc::REG_RIP as usize] as u64;
        out.state.rflags = regs[libc::REG_EFL as usize] as u64;
        out.vector = regs[libc::REG_TRAPNO as usize] as u64;
        if signal == libc::SIGVTALRM {
            out.vector = HUNG;
        } else if signal == libc::SIGSYS {
            out.vector = ESCAPED;
        }
        out.error = regs[libc::REG_ERR as usize] as u64;
        out.address = regs[libc::REG_CR2 as usize] as u64;
        let fp = context.uc_mcontext.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(fp, out.state.xsave.as_mut_ptr(), XSAVE);
        // The child's own code must not run under the case's floating-point control.
        fp.cast::<u16>().write_unaligned(0x37f);
        fp.add(2).cast::<u16>().write_unaligned(0);
        fp.add(4).write(0);
        fp.add(24).cast::<u32>().write_unaligned(0x1f80);
        regs[libc::REG_RIP as usize] = mvm_fuzz_resume as *const () as i64;
        regs[libc::REG_EFL as usize] = 0x202;
        // Back to 64-bit code.
        regs[libc::REG_CSGSFS as usize] = regs[libc::REG_CSGSFS as usize] & !0xffff | 0x33;
    }
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn map(address: u64, size: usize, protection: i32, flags: i32) -> io::Result<*mut u8> {
    // SAFETY: a new mapping; fixed ones do not replace anything.
    let at = unsafe {
        libc::mmap(address as *mut c_void, size, protection, flags | libc::MAP_ANONYMOUS, -1, 0)
    };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
}

impl Native {
    /// Starts the child.
    pub fn new() -> io::Result<Self> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let shared = map(0, size_of::<Shared>(), rw, libc::MAP_SHARED)?.cast::<Shared>();
        let mut native = Self { shared, child: 0, to_child: -1, from_child: -1 };
        native.spawn()?;
        Ok(native)
    }

    fn spawn(&mut self) -> io::Result<()> {
        let mut go = [0; 2];
        let mut done = [0; 2];
        // SAFETY: plain system calls; the child uses nothing but async-signal-safe calls.
        unsafe {
            check(libc::pipe2(go.as_mut_ptr(), libc::O_CLOEXEC).into())?;
            check(libc::pipe2(done.as_mut_ptr(), libc::O_CLOEXEC).into())?;
            self.child = check(libc::fork().into())? as libc::pid_t;
            if self.child == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                child(self.shared, go[0], done[1]);
                libc::_exit(1);
            }
            libc::close(go[0]);
            libc::close(done[1]);
        }
        (self.to_child, self.from_child) = (go[1], done[0]);
        Ok(())
    }

    fn reap(&mut self) {
        // SAFETY: our own child and descriptors.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
            libc::close(self.to_child);
            libc::close(self.from_child);
        }
    }

    /// Runs up to [`BATCH`] cases. A case that kills or hangs the child has no outcome.
    pub fn run(&mut self, cases: &[Case]) -> io::Result<Vec<Option<Outcome>>> {
        assert!(cases.len() <= BATCH);
        let mut outcomes: Vec<Option<Outcome>> = Vec::with_capacity(cases.len());
        while outcomes.len() < cases.len() {
            let rest = &cases[outcomes.len()..];
            // SAFETY: the child waits for its pipe; the mapping is ours.
            let done = unsafe {
                let shared = &mut *self.shared;
                shared.count = rest.len() as u64;
                shared.done = 0;
                shared.cases[..rest.len()].copy_from_slice(rest);
                let byte = 1u8;
                check(libc::write(self.to_child, addr_of!(byte).cast(), 1) as i64)?;
                let mut poll =
                    libc::pollfd { fd: self.from_child, events: libc::POLLIN, revents: 0 };
                let mut byte = 0u8;
                // The child ends hung cases by itself, by its own processor time. If it makes no progress
                // for five minutes, it is lost.
                let (mut seen, mut idle) = (0, 0);
                let ready = loop {
                    let ready = libc::poll(&mut poll, 1, 30_000) == 1;
                    let done = std::ptr::read_volatile(addr_of!(shared.done));
                    idle = if done == seen { idle + 1 } else { 0 };
                    if ready || idle == 10 {
                        break ready;
                    }
                    seen = done;
                };
                let ready = ready && libc::read(self.from_child, addr_of_mut!(byte).cast(), 1) == 1;
                let done = std::ptr::read_volatile(addr_of!(shared.done)) as usize;
                outcomes.extend(shared.outcomes[..done.min(rest.len())].iter().map(|o| Some(*o)));
                ready
            };
            if !done {
                outcomes.push(None);
                self.reap();
                self.spawn()?;
            }
        }
        Ok(outcomes)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.reap();
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

/// Makes system calls from the code pages, and 32-bit ones, end in SIGSYS.
///
/// # Safety
/// Only for the child: it cannot be undone.
unsafe fn no_system_calls() -> bool {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const JUMP_ABOVE: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
    const RETURN: u16 = 0x06;
    const X86_64: u32 = 0xc000_003e;
    const TRAP: u32 = 0x0003_0000;
    const ALLOW: u32 = 0x7fff_0000;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        step(LOAD, 4, 0, 0), // architecture
        step(JUMP_EQUAL, X86_64, 0, 5),
        step(LOAD, 12, 0, 0), // instruction pointer, upper half
        step(JUMP_EQUAL, 0, 0, 4),
        step(LOAD, 8, 0, 0), // lower half
        step(JUMP_ABOVE, CODE as u32 + CODE_SIZE as u32 + 16, 2, 0),
        step(JUMP_ABOVE, CODE as u32, 0, 1),
        step(RETURN, TRAP, 0, 0),
        step(RETURN, ALLOW, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: plain system calls; the program lives until they return.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    }
}

/// The child's life.
unsafe fn child(shared: *mut Shared, go: i32, done: i32) {
    let fixed = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let maps = map(CODE, CODE_SIZE, rw | libc::PROT_EXEC, fixed)
        .and_then(|_| map(DATA, (HOLE - DATA) as usize, rw, fixed))
        .and_then(|_| map(0, 65536, rw, libc::MAP_PRIVATE));
    let Ok(stack) = maps else { return };
    let code = CODE as *mut u8;
    let data = DATA as *mut u8;
    // SAFETY: the mappings just made; signal set-up of this single-threaded process.
    unsafe {
        let read_only = std::slice::from_raw_parts_mut(READ_ONLY as *mut u8, 4096);
        fill(0, read_only);
        libc::mprotect(READ_ONLY as *mut c_void, 4096, libc::PROT_READ);
        let alternate = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 65536 };
        libc::sigaltstack(&alternate, std::ptr::null_mut());
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in
            [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGBUS, libc::SIGSYS]
        {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        // 32-bit code needs data segments.
        std::arch::asm!(
            "mov ds, {0:e}", "mov es, {0:e}", in(reg) 0x2b, options(nostack, preserves_flags)
        );
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGVTALRM, &action, std::ptr::null_mut());
        let second = libc::timeval { tv_sec: 1, tv_usec: 0 };
        let every_second = libc::itimerval { it_interval: second, it_value: second };
        setitimer(ITIMER_VIRTUAL, &every_second, std::ptr::null_mut());
        const ARCH_SET_GS: i32 = 0x1001;
        libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE);
        if !no_system_calls() {
            return;
        }
        loop {
            let mut byte = 0u8;
            if libc::read(go, addr_of_mut!(byte).cast(), 1) != 1 {
                return;
            }
            for i in 0..(*shared).count as usize {
                let case = &(&(*shared).cases)[i];
                let out = addr_of_mut!((*shared).outcomes[i]);
                RESULT = out;
                let at = (case.state.rip - CODE) as usize;
                std::ptr::write_bytes(code, 0xcc, CODE_SIZE);
                std::ptr::copy_nonoverlapping(case.code.as_ptr(), code.add(at), case.len as usize);
                fill(case.data_seed, std::slice::from_raw_parts_mut(data, DATA_SIZE));
                mvm_fuzz_run(&case.state, case.compat);
                std::ptr::copy_nonoverlapping(data, (&raw mut (*out).data).cast(), DATA_SIZE);
                std::ptr::write_volatile(addr_of_mut!((*shared).done), i as u64 + 1);
            }
            libc::write(done, addr_of!(byte).cast(), 1);
        }
    }
}
