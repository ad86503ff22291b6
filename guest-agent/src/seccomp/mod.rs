//! The specification's seccomp profile as a stack of filters.
//!
//! The compiler, seccompiler, gives a filter one action for calls that match and one for those that
//! do not. A profile has many actions, so each becomes a filter of its own and the kernel takes the
//! most restrictive verdict of all of them (of equal ones the verdict of the filter installed
//! last):
//!
//! * the *default* filter lets through the calls that any rule with another action than the
//!   default mentions and answers all others with the default action;
//! * for every other action but "allow" a filter answers the calls its rules match and lets the
//!   rest through. Error returns come last so that they win over an equal default.
//!
//! The compiler's filters end a process of any other architecture. A 32-bit program must live, and
//! must not be a way around the profile either, so every filter is made twice, with the numbers of
//! each architecture, and with a prologue of our own that lets the respective other one through.
//! Architectures that the profile does not name are not let in (`linux.seccomp.architectures`).

mod syscalls;

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use crate::error::{Context, Error, Result};
use crate::sys;

/// Filters ready to be installed.
#[derive(Debug)]
pub struct Filters {
    programs: Vec<BpfProgram>,
    flags: u64,
}

/// The rules of one action: for each call, chains of which one must match (none = always).
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// One of the two architectures of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Bits64,
    Bits32,
}

impl Width {
    /// `AUDIT_ARCH_*`.
    fn audit_arch(self) -> u32 {
        match self {
            Self::Bits64 => 0xc000_003e,
            Self::Bits32 => 0x4000_0003,
        }
    }

    fn number(self, name: &str) -> Option<i64> {
        let (wide, narrow) = syscalls::numbers(name)?;
        match self {
            Self::Bits64 => wide,
            Self::Bits32 => narrow,
        }
    }
}

/// Compiles a profile.
///
/// # Errors
/// For actions and flags that are not supported, by name, and for what the kernel could not take.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filters> {
    if profile.listener_path().is_some() {
        return Err(unsupported("linux.seccomp.listenerPath"));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let listed = profile.architectures().as_deref().unwrap_or_default();
    // None listed means the native one.
    let has_32 = listed.contains(&Arch::ScmpArchX86);
    let other = if has_32 { SeccompAction::Allow } else { SeccompAction::KillProcess };

    let mut programs = vec![];
    for width in [Width::Bits64, Width::Bits32] {
        if width == Width::Bits32 && !has_32 {
            continue;
        }
        for program in compile_for(width, profile, &default)? {
            programs.push(with_prologue(program, width, &other));
        }
    }
    Ok(Filters { programs, flags: flags(profile)? })
}

impl Filters {
    /// Installs all of them on this process, for good.
    pub fn install(&self) -> Result<()> {
        for program in &self.programs {
            sys::install_seccomp(program, self.flags)
                .context(|| "linux.seccomp: install a filter".into())?;
        }
        Ok(())
    }
}

fn unsupported(what: &str) -> Error {
    Error::Unsupported(format!("{what} is not supported: nobody in the guest could answer"))
}

fn flags(profile: &LinuxSeccomp) -> Result<u64> {
    let mut bits = 0;
    for flag in profile.flags().iter().flatten() {
        bits |= match flag {
            // The only thread of this process is the one that installs the filter.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 1 << 1,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 1 << 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(unsupported(
                    "linux.seccomp.flags: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ));
            }
        };
    }
    Ok(bits)
}

fn action(action: LinuxSeccompAction, value: Option<u32>) -> Result<SeccompAction> {
    let errno = value.unwrap_or(libc::EPERM.unsigned_abs());
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            SeccompAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => SeccompAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => SeccompAction::Trap,
        LinuxSeccompAction::ScmpActErrno => SeccompAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => SeccompAction::Trace(errno),
        LinuxSeccompAction::ScmpActLog => SeccompAction::Log,
        LinuxSeccompAction::ScmpActAllow => SeccompAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(unsupported("linux.seccomp: action SCMP_ACT_NOTIFY"));
        }
    })
}

fn compile_for(
    width: Width,
    profile: &LinuxSeccomp,
    default: &SeccompAction,
) -> Result<Vec<BpfProgram>> {
    // Calls that the default does not decide.
    let mut decided = Rules::new();
    let mut others: Vec<(SeccompAction, Rules)> = Vec::new();
    for syscall in profile.syscalls().iter().flatten() {
        let answer = action(syscall.action(), syscall.errno_ret())?;
        if answer == *default {
            continue;
        }
        add(&mut decided, width, syscall)?;
        if answer == SeccompAction::Allow {
            continue;
        }
        match others.iter_mut().find(|(known, _)| *known == answer) {
            Some((_, rules)) => add(rules, width, syscall)?,
            None => {
                let mut rules = Rules::new();
                add(&mut rules, width, syscall)?;
                others.push((answer, rules));
            }
        }
    }
    // Among equally restrictive verdicts the filter installed last wins: errors of rules after
    // the default's.
    others.sort_by_key(|(answer, _)| matches!(answer, SeccompAction::Errno(_)));

    let mut programs = Vec::new();
    if *default != SeccompAction::Allow {
        programs.push(program(decided, default.clone(), SeccompAction::Allow)?);
    }
    for (answer, rules) in others {
        programs.push(program(rules, SeccompAction::Allow, answer)?);
    }
    Ok(programs)
}

fn program(rules: Rules, mismatch: SeccompAction, matched: SeccompAction) -> Result<BpfProgram> {
    let refused = |e: &dyn std::fmt::Display| Error::Invalid(format!("linux.seccomp: {e}"));
    let filter = SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)
        .map_err(|e| refused(&e))?;
    BpfProgram::try_from(filter).map_err(|e| refused(&e))
}

/// Adds the rule for every call that the architecture has; unknown names are no error, profiles
/// name calls of newer kernels and other architectures.
fn add(rules: &mut Rules, width: Width, syscall: &LinuxSyscall) -> Result<()> {
    let args = syscall.args().as_deref().unwrap_or_default();
    for name in syscall.names() {
        let Some(number) = width.number(name) else { continue };
        if args.is_empty() {
            rules.insert(number, Vec::new());
            continue;
        }
        // An unconditional rule that is there already covers this one.
        if rules.get(&number).is_some_and(Vec::is_empty) {
            continue;
        }
        let chains = rules.entry(number).or_default();
        for conditions in alternatives(args) {
            let conditions = conditions.into_iter().map(condition).collect::<Result<Vec<_>>>()?;
            let rule = SeccompRule::new(conditions)
                .map_err(|e| Error::Invalid(format!("linux.seccomp: {name}: {e}")))?;
            chains.push(rule);
        }
    }
    Ok(())
}

/// Conditions on different arguments must all hold. If one argument has several, then, as with
/// other runtimes, each condition is a rule of its own.
fn alternatives(args: &[LinuxSeccompArg]) -> Vec<Vec<&LinuxSeccompArg>> {
    let repeated = args
        .iter()
        .enumerate()
        .any(|(at, arg)| args[..at].iter().any(|earlier| earlier.index() == arg.index()));
    if repeated { args.iter().map(|arg| vec![arg]).collect() } else { vec![args.iter().collect()] }
}

fn condition(arg: &LinuxSeccompArg) -> Result<SeccompCondition> {
    let mut value = arg.value();
    let operator = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => SeccompCmpOp::Ne,
        LinuxSeccompOperator::ScmpCmpLt => SeccompCmpOp::Lt,
        LinuxSeccompOperator::ScmpCmpLe => SeccompCmpOp::Le,
        LinuxSeccompOperator::ScmpCmpEq => SeccompCmpOp::Eq,
        LinuxSeccompOperator::ScmpCmpGe => SeccompCmpOp::Ge,
        LinuxSeccompOperator::ScmpCmpGt => SeccompCmpOp::Gt,
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let mask = value;
            value = arg.value_two().unwrap_or(0);
            SeccompCmpOp::MaskedEq(mask)
        }
    };
    let invalid = |e: &dyn std::fmt::Display| {
        Error::Invalid(format!("linux.seccomp: argument {}: {e}", arg.index()))
    };
    let index = u8::try_from(arg.index()).map_err(|e| invalid(&e))?;
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value).map_err(|e| invalid(&e))
}

/// Replaces the compiler's architecture check, its first three instructions (load, compare, kill),
/// by one that gives `other` to other architectures.
fn with_prologue(program: BpfProgram, width: Width, other: &SeccompAction) -> BpfProgram {
    const CHECK: usize = 3;
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ARCH_OFFSET: u32 = 4;
    let mut result = vec![
        sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: ARCH_OFFSET },
        sock_filter { code: JUMP_IF_EQUAL, jt: 1, jf: 0, k: width.audit_arch() },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: other.clone().into() },
    ];
    result.extend(program.into_iter().skip(CHECK));
    result
}

#[cfg(test)]
mod tests;
