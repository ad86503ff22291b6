//! Device access rules as a BPF program (`BPF_PROG_TYPE_CGROUP_DEVICE`), which is how control groups
//! version 2 restrict devices.
//!
//! The last rule that matches decides, so the program tries them in reverse. What no rule mentions
//! is denied. Behind the specification's rules come those for the devices that every container
//! has, and for making any node (which gives no access to the device).

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Context, Error, Result};
use crate::sys;

const READ: u8 = 2;
const WRITE: u8 = 4;
const MAKE: u8 = 1;
const ALL: u8 = READ | WRITE | MAKE;

const BLOCK: u8 = 1;
const CHARACTER: u8 = 2;

/// One rule; `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u8>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

const fn device(major: u32, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: ALL }
}

const fn make(kind: u8) -> Rule {
    Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MAKE }
}

/// Null, zero, full, random, urandom, tty, console, ptmx, terminals.
const ALWAYS: [Rule; 11] = [
    make(CHARACTER),
    make(BLOCK),
    device(1, Some(3)),
    device(1, Some(5)),
    device(1, Some(7)),
    device(1, Some(8)),
    device(1, Some(9)),
    device(5, Some(0)),
    device(5, Some(1)),
    device(5, Some(2)),
    device(136, None),
];

/// Compiles the specification's rules.
pub fn program(rules: &[LinuxDeviceCgroup]) -> Result<Vec<u64>> {
    let mut all = rules.iter().map(rule).collect::<Result<Vec<_>>>()?;
    all.extend(ALWAYS);
    Ok(compile(&all))
}

fn rule(spec: &LinuxDeviceCgroup) -> Result<Rule> {
    let number = |n: Option<i64>| match n {
        None | Some(-1) => Ok(None),
        Some(n) => u32::try_from(n).map(Some).map_err(|_| {
            Error::Invalid(format!("linux.resources.devices: device number {n} out of range"))
        }),
    };
    let kind = match spec.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(LinuxDeviceType::P) => {
            return Err(Error::Invalid(
                "linux.resources.devices: there are no rules for pipes (type \"p\")".into(),
            ));
        }
    };
    let mut access = 0;
    for letter in spec.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MAKE,
            other => {
                return Err(Error::Invalid(format!(
                    "linux.resources.devices: access {other:?} is none of r, w, m"
                )));
            }
        };
    }
    Ok(Rule {
        allow: spec.allow(),
        kind,
        major: number(spec.major())?,
        minor: number(spec.minor())?,
        access: if access == 0 { ALL } else { access },
    })
}

// Instructions: opcode, destination and source register, jump offset, constant.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_CONST: u8 = 0xb7;
const AND_CONST: u8 = 0x57;
const SHIFT_RIGHT_CONST: u8 = 0x77;
const JUMP_NOT_CONST: u8 = 0x55;
const JUMP_NOT: u8 = 0x5d;
const EXIT: u8 = 0x95;

fn instruction(code: u8, to: u8, from: u8, offset: i16, constant: u32) -> u64 {
    let registers = (from << 4) | to;
    u64::from(code)
        | u64::from(registers) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(constant) << 32
}

/// The program: register 2 is the kind of device, 3 the access asked for, 4 and 5 its numbers.
fn compile(rules: &[Rule]) -> Vec<u64> {
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(AND_CONST, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_CONST, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let is_always = rule.kind.is_none()
            && rule.major.is_none()
            && rule.minor.is_none()
            && rule.access == ALL;
        code.extend(compile_rule(rule));
        if is_always {
            // What would come behind can never run, which the kernel's verifier does not accept.
            return code;
        }
    }
    code.extend(verdict(false));
    code
}

fn verdict(allow: bool) -> [u64; 2] {
    [instruction(MOVE_CONST, 0, 0, 0, u32::from(allow)), instruction(EXIT, 0, 0, 0, 0)]
}

fn compile_rule(rule: &Rule) -> Vec<u64> {
    // Tests with the number of instructions of each; a failing one jumps to the next rule.
    let mut tests: Vec<Vec<(u8, u8, u8, u32)>> = Vec::new();
    if let Some(kind) = rule.kind {
        tests.push(vec![(JUMP_NOT_CONST, 2, 0, kind.into())]);
    }
    if rule.access != ALL {
        // A rule matches if it covers all that is asked for.
        tests.push(vec![
            (MOVE, 1, 3, 0),
            (AND_CONST, 1, 0, rule.access.into()),
            (JUMP_NOT, 1, 3, 0),
        ]);
    }
    for (register, number) in [(4, rule.major), (5, rule.minor)] {
        if let Some(number) = number {
            tests.push(vec![(JUMP_NOT_CONST, register, 0, number)]);
        }
    }
    let steps: Vec<_> = tests.concat();
    let mut code: Vec<u64> = Vec::with_capacity(steps.len() + 2);
    for (at, (op, to, from, constant)) in steps.iter().enumerate() {
        let is_jump = matches!(*op, JUMP_NOT | JUMP_NOT_CONST);
        // Over the remaining steps and the verdict's two instructions.
        let distance = i16::try_from(steps.len() - at - 1 + 2).unwrap_or(i16::MAX);
        code.push(instruction(*op, *to, *from, if is_jump { distance } else { 0 }, *constant));
    }
    code.extend(verdict(rule.allow));
    code
}

const PROGRAM_LOAD: i32 = 5;
const PROGRAM_ATTACH: i32 = 8;
const PROGRAM_DETACH: i32 = 9;
const TYPE_CGROUP_DEVICE: u64 = 15;
const ATTACH_CGROUP_DEVICE: u64 = 6;
/// Groups below may add programs; all of them have to agree.
const ALLOW_MULTI: u64 = 2;

/// Loads a program into the kernel.
pub fn load(program: &[u64]) -> Result<OwnedFd> {
    let count = u64::try_from(program.len()).unwrap_or(u64::MAX);
    let mut attr = [
        TYPE_CGROUP_DEVICE | count << 32,
        address(program.as_ptr().cast()),
        address(c"Apache-2.0".as_ptr().cast()),
        0,
        0,
        0,
    ];
    sys::bpf(PROGRAM_LOAD, &mut attr)
        .map(sys::own)
        .context(|| "linux.resources.devices: load the access rules".into())
}

fn address(pointer: *const u8) -> u64 {
    u64::try_from(pointer.addr()).unwrap_or(0)
}

/// Attaches a loaded program to a group.
pub fn attach(group: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<()> {
    bind(PROGRAM_ATTACH, group, program, ALLOW_MULTI)
        .context(|| "linux.resources.devices: attach the access rules".into())
}

/// Detaches it again.
pub fn detach(group: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<()> {
    bind(PROGRAM_DETACH, group, program, 0)
        .context(|| "linux.resources.devices: detach the former access rules".into())
}

fn bind(
    command: i32,
    group: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    flags: u64,
) -> Result<(), Errno> {
    let number = |fd: BorrowedFd<'_>| u64::from(fd.as_raw_fd().unsigned_abs());
    let mut attr = [number(group) | number(program) << 32, ATTACH_CGROUP_DEVICE | flags << 32];
    sys::bpf(command, &mut attr).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would: is this access allowed?
    fn allowed(program: &[u64], kind: u8, access: u8, major: u32, minor: u32) -> bool {
        let context = [u32::from(kind) | u32::from(access) << 16, major, minor];
        let mut r = [0_u64; 6];
        let mut pc = 0;
        loop {
            let i = program[pc];
            pc += 1;
            let (code, to, from) = (i as u8, (i >> 8 & 15) as usize, (i >> 12 & 15) as usize);
            let (offset, constant) = ((i >> 16) as i16, i >> 32);
            let target = pc.wrapping_add_signed(offset.into());
            match code {
                LOAD_WORD => r[to] = context[offset as usize / 4].into(),
                MOVE => r[to] = r[from],
                MOVE_CONST => r[to] = constant,
                AND_CONST => r[to] &= constant,
                SHIFT_RIGHT_CONST => r[to] >>= constant,
                JUMP_NOT_CONST if r[to] != constant => pc = target,
                JUMP_NOT if r[to] != r[from] => pc = target,
                JUMP_NOT_CONST | JUMP_NOT => {}
                EXIT => return r[0] != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn of(json: &str) -> Vec<u64> {
        program(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap()).unwrap()
    }

    const DENY_ALL_BUT_FUSE: &str = r#"[{"allow":false,"access":"rwm"},
        {"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]"#;

    #[test]
    fn the_last_matching_rule_decides() {
        let p = of(DENY_ALL_BUT_FUSE);
        assert!(allowed(&p, CHARACTER, READ | WRITE, 10, 229));
        assert!(!allowed(&p, CHARACTER, READ, 10, 200));
        assert!(!allowed(&p, BLOCK, READ, 10, 229));
        assert!(!allowed(&p, BLOCK, READ, 254, 0));
    }

    #[test]
    fn default_devices_and_making_nodes_are_always_allowed() {
        let p = of(DENY_ALL_BUT_FUSE);
        assert!(allowed(&p, CHARACTER, READ | WRITE, 1, 3), "null");
        assert!(allowed(&p, CHARACTER, READ | WRITE, 136, 5), "a terminal");
        assert!(allowed(&p, BLOCK, MAKE, 254, 0));
        assert!(
            !allowed(&p, BLOCK, MAKE | READ, 254, 0),
            "all of what is asked for must be allowed"
        );
    }

    #[test]
    fn a_later_denial_wins_over_an_earlier_permission() {
        let p = of(
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":254,"access":"w"}]"#,
        );
        assert!(allowed(&p, BLOCK, READ, 254, 1));
        assert!(!allowed(&p, BLOCK, WRITE, 254, 1));
        assert!(allowed(&p, BLOCK, WRITE, 8, 0));
    }

    #[test]
    fn nonsense_is_refused() {
        for json in [
            r#"[{"allow":true,"access":"x"}]"#,
            r#"[{"allow":true,"type":"p"}]"#,
            r#"[{"allow":true,"major":-7}]"#,
        ] {
            let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
            assert!(program(&rules).is_err(), "{json}");
        }
    }

    #[test]
    fn the_kernels_verifier_takes_the_programs() {
        for json in [DENY_ALL_BUT_FUSE, r#"[{"allow":true,"access":"rwm"}]"#] {
            match load(&of(json)) {
                Ok(_) => {}
                // Not everybody may load programs.
                Err(Error::System { errno: libc::EPERM | libc::ENOSYS, .. }) => return,
                Err(e) => panic!("{json}: {e}"),
            }
        }
    }
}
