//! The compiled programs are run by an interpreter of classic BPF and their verdicts compared with
//! what the profile says.

use super::*;

const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;
const EPERM: u32 = ERRNO | 1;
const ENOSYS: u32 = ERRNO | 38;

const AUDIT_64: u32 = 0xc000_003e;
const AUDIT_32: u32 = 0x4000_0003;

/// One program's verdict on `struct seccomp_data`.
fn run(program: &[sock_filter], data: &[u8; 64]) -> u32 {
    let (mut a, mut pc) = (0_u32, 0_usize);
    loop {
        let i = &program[pc];
        pc += 1;
        let jump = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
        match i.code {
            0x20 => {
                let at = i.k as usize;
                a = u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
            }
            0x54 => a &= i.k,
            0x05 => pc += i.k as usize,
            0x15 => pc += jump(a == i.k),
            0x25 => pc += jump(a > i.k),
            0x35 => pc += jump(a >= i.k),
            0x06 => return i.k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// The kernel's rule: the verdict with the smallest action as a signed number wins, of equal ones
/// the one of the filter that was installed last.
fn verdict(filters: &Filters, arch: u32, number: i64, args: &[u64]) -> u32 {
    let mut data = [0; 64];
    data[0..4].copy_from_slice(&u32::try_from(number).unwrap().to_ne_bytes());
    data[4..8].copy_from_slice(&arch.to_ne_bytes());
    for (at, arg) in args.iter().enumerate() {
        data[16 + at * 8..24 + at * 8].copy_from_slice(&arg.to_ne_bytes());
    }
    let action = |v: u32| (v & 0xffff_0000).cast_signed();
    filters
        .programs
        .iter()
        .rev()
        .map(|program| run(program, &data))
        .fold(ALLOW, |best, v| if action(v) < action(best) { v } else { best })
}

fn profile(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).unwrap()
}

/// In the shape of the profile that container engines use.
const LIKE_DEFAULT: &str = r#"{
    "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "syscalls": [
        {"names": ["read", "write", "exit_group", "futex_time64", "call_of_the_future"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
        {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 4294967295, "op": "SCMP_CMP_EQ"}]},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    ]}"#;

#[test]
fn allow_list_with_conditions_and_special_errnos() {
    let filters = compile(&profile(LIKE_DEFAULT)).unwrap();
    let on_64 = |call: i64, args: &[u64]| verdict(&filters, AUDIT_64, call, args);
    assert_eq!(on_64(libc::SYS_read, &[]), ALLOW);
    assert_eq!(on_64(libc::SYS_mount, &[]), EPERM);
    assert_eq!(on_64(libc::SYS_clone3, &[]), ENOSYS, "not the default's errno");
    assert_eq!(on_64(libc::SYS_personality, &[0]), ALLOW);
    assert_eq!(on_64(libc::SYS_personality, &[0xffff_ffff]), ALLOW);
    assert_eq!(on_64(libc::SYS_personality, &[8]), EPERM);
    assert_eq!(on_64(libc::SYS_clone, &[0x11]), ALLOW);
    assert_eq!(on_64(libc::SYS_clone, &[0x1000_0000]), EPERM, "a new user namespace");
}

#[test]
fn programs_of_32_bits_live_under_the_same_rules() {
    let filters = compile(&profile(LIKE_DEFAULT)).unwrap();
    let on_32 = |call: i64| verdict(&filters, AUDIT_32, call, &[]);
    assert_eq!(on_32(3), ALLOW, "read");
    assert_eq!(on_32(4), ALLOW, "write");
    assert_eq!(on_32(422), ALLOW, "futex_time64, which only 32-bit programs have");
    assert_eq!(on_32(21), EPERM, "mount");
    assert_eq!(on_32(435), ENOSYS, "clone3");
    // The 64-bit number of read is the 32-bit number of nothing harmless: it must not leak over.
    assert_eq!(on_32(libc::SYS_read), EPERM, "restart_syscall");
}

#[test]
fn architectures_that_are_not_listed_are_killed() {
    let json = r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_KILL_PROCESS"}]}"#;
    let filters = compile(&profile(json)).unwrap();
    assert_eq!(verdict(&filters, AUDIT_64, libc::SYS_read, &[]), ALLOW);
    assert_eq!(verdict(&filters, AUDIT_64, libc::SYS_mount, &[]), KILL_PROCESS);
    assert_eq!(verdict(&filters, AUDIT_32, 3, &[]), KILL_PROCESS);
}

#[test]
fn default_of_killing_and_several_actions() {
    let json = r#"{"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [
        {"names": ["read", "getpid"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["umount2"], "action": "SCMP_ACT_LOG"},
        {"names": ["swapon"], "action": "SCMP_ACT_TRAP"}]}"#;
    let filters = compile(&profile(json)).unwrap();
    let of = |call| verdict(&filters, AUDIT_64, call, &[]);
    assert_eq!(of(libc::SYS_getpid), ALLOW);
    assert_eq!(of(libc::SYS_mount), ENOSYS);
    assert_eq!(of(libc::SYS_umount2), 0x7ffc_0000);
    assert_eq!(of(libc::SYS_swapon), 0x0003_0000);
    assert_eq!(of(libc::SYS_write), KILL_PROCESS);
}

#[test]
fn conditions_on_one_argument_are_alternatives_on_several_all_must_hold() {
    let json = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]},
        {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 5, "op": "SCMP_CMP_LE"}, {"index": 1, "value": 7, "op": "SCMP_CMP_NE"}]}]}"#;
    let filters = compile(&profile(json)).unwrap();
    let of = |call, args: &[u64]| verdict(&filters, AUDIT_64, call, args);
    assert_eq!(of(libc::SYS_socket, &[1]), ALLOW);
    assert_eq!(of(libc::SYS_socket, &[2]), ALLOW);
    assert_eq!(of(libc::SYS_socket, &[3]), EPERM);
    assert_eq!(of(libc::SYS_ioctl, &[5, 8]), ALLOW);
    assert_eq!(of(libc::SYS_ioctl, &[5, 7]), EPERM);
    assert_eq!(of(libc::SYS_ioctl, &[1 << 32, 8]), EPERM, "all 64 bits are compared");
}

#[test]
fn notify_is_refused_by_name() {
    for json in [
        r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}"#,
    ] {
        let error = compile(&profile(json)).unwrap_err();
        assert!(
            matches!(&error, Error::Unsupported(m) if m.contains("SCMP_ACT_NOTIFY")),
            "{error}"
        );
    }
}

#[test]
fn a_profile_that_allows_everything_needs_no_filter() {
    assert!(
        compile(&profile(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#)).unwrap().programs.is_empty()
    );
}
