//! `linux.seccomp`.

use serde_json::{Value, json};

use crate::machine::{Case, sh, volume};

const SIGSYS: u32 = 31;

fn profile(seccomp: Value) -> Value {
    json!({"linux": {"seccomp": seccomp}})
}

/// Everything is allowed but what `syscalls` say.
fn but(syscalls: Value) -> Value {
    profile(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls}))
}

fn no_mkdir(action: &str, errno: Value) -> Value {
    let mut rule = json!({"names": ["mkdir", "mkdirat", "no_such_call"], "action": action});
    if !errno.is_null() {
        rule["errnoRet"] = errno;
    }
    but(json!([rule]))
}

#[test]
fn seccomp_actions() {
    let mkdir = |action: &str, errno: Value| {
        let outcome = sh("mkdir /x; echo code $?").with(no_mkdir(action, errno)).run();
        assert_eq!(outcome.code, 0, "{outcome:?}");
        format!("{}{}", outcome.out, outcome.err)
    };
    let plain = mkdir("SCMP_ACT_ERRNO", Value::Null);
    assert!(plain.contains("code 1") && plain.contains("Operation not permitted"), "{plain}");
    let chosen = mkdir("SCMP_ACT_ERRNO", json!(28));
    assert!(chosen.contains("No space left"), "{chosen}");
    let zero = mkdir("SCMP_ACT_ERRNO", json!(0));
    assert!(zero.contains("code 0"), "an error number of 0 is success: {zero}");
    for action in
        ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"]
    {
        let killed = mkdir(action, Value::Null);
        assert!(killed.contains(&format!("code {}", 128 + SIGSYS)), "{action}: {killed}");
    }
    let traced = mkdir("SCMP_ACT_TRACE", Value::Null);
    assert!(traced.contains("not implemented"), "nobody traces: {traced}");
    for action in ["SCMP_ACT_LOG", "SCMP_ACT_ALLOW"] {
        assert!(mkdir(action, Value::Null).contains("code 0"), "{action}");
    }
    let first = sh("exec mkdir /x").with(no_mkdir("SCMP_ACT_KILL_PROCESS", Value::Null)).run();
    assert_eq!(first.signal, SIGSYS, "the signal is the exit of the container");
}

/// What a static program needs to write a line, and nothing more.
const LITTLE: [&str; 22] = [
    "execve",
    "capset",
    "brk",
    "arch_prctl",
    "set_tid_address",
    "set_robust_list",
    "rseq",
    "prlimit64",
    "readlink",
    "readlinkat",
    "getrandom",
    "mprotect",
    "mmap",
    "munmap",
    "getuid",
    "write",
    "exit",
    "exit_group",
    "fstat",
    "newfstatat",
    "ioctl",
    "rt_sigprocmask",
];

#[test]
fn seccomp_default_action_and_error() {
    let few = |no_new_privileges: bool, errno: u32| -> Case {
        let seccomp = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno,
            "syscalls": [{"names": LITTLE, "action": "SCMP_ACT_ALLOW"}],
        });
        crate::machine::run(&["echo", "hi"])
            .with(profile(seccomp))
            .with(json!({"process": {"noNewPrivileges": no_new_privileges}}))
    };
    // A profile has to allow what the program does, not what the agent does before it.
    for no_new_privileges in [true, false] {
        let outcome = few(no_new_privileges, 1).run();
        assert_eq!((outcome.code, outcome.out.as_str()), (0, "hi\n"), "{outcome:?}");
    }
    let mut denied = few(true, 38);
    denied.spec["process"]["args"] = json!(["mkdir", "/x"]);
    assert!(denied.run().err.contains("not implemented"), "error 38 of the default");
    let capset = sh("grep CapEff /proc/self/status; grep Seccomp: /proc/self/status")
        .capabilities(&["CAP_KILL"])
        .with(no_mkdir("SCMP_ACT_ERRNO", Value::Null));
    assert_eq!(
        capset.out().split_whitespace().collect::<Vec<_>>(),
        ["CapEff:", "0000000000000020", "Seccomp:", "2"],
        "no capability is left over from the installation"
    );
}

/// Of the signals that a shell can send itself without harm, those that a rule lets through.
fn sent(args: Value) -> String {
    let rules = json!([{"names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": args}]);
    let script = "for s in 17 18 23 28; do kill -$s $$ 2>/dev/null && echo -n \"$s \"; done; true";
    sh(script).with(but(rules)).out()
}

#[test]
fn seccomp_arguments_and_operators() {
    let signal = |op: &str, value: u64, two: u64| {
        sent(json!([{"index": 1, "value": value, "valueTwo": two, "op": op}]))
    };
    assert_eq!(signal("SCMP_CMP_EQ", 18, 0), "17 23 28 ");
    assert_eq!(signal("SCMP_CMP_NE", 18, 0), "18 ");
    assert_eq!(signal("SCMP_CMP_LT", 18, 0), "18 23 28 ");
    assert_eq!(signal("SCMP_CMP_LE", 18, 0), "23 28 ");
    assert_eq!(signal("SCMP_CMP_GE", 23, 0), "17 18 ");
    assert_eq!(signal("SCMP_CMP_GT", 23, 0), "17 18 23 ");
    // 17, 18 and 23 have bit 4 and neither 2 nor 3: the mask is the first value.
    assert_eq!(signal("SCMP_CMP_MASKED_EQ", 0x1c, 0x10), "23 28 ");
    let eq = |index: u64, value: u64| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
    assert_eq!(sent(json!([eq(0, 1), eq(1, 23)])), "17 18 28 ", "different arguments: all");
    assert_eq!(sent(json!([eq(0, 2), eq(1, 23)])), "17 18 23 28 ");
    assert_eq!(sent(json!([eq(1, 17), eq(1, 23)])), "18 28 ", "the same argument: any");
    let rule = json!([{"names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": [eq(6, 0)]}]);
    let refused = sh("true").with(but(rule)).refused();
    assert!(refused.contains("linux.seccomp") && refused.contains("argument 6"), "{refused}");
}

/// A 32-bit program that ends with code 42.
fn program_of_32_bits() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const CODE: [u8; 12] = [0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80];
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    let size = 52 + 32 + 12;
    let words = |elf: &mut Vec<u8>, words: &[u32]| {
        words.iter().for_each(|w| elf.extend_from_slice(&w.to_le_bytes()));
    };
    // Version, entry, program headers, section headers, flags.
    words(&mut elf, &[1, BASE + 84, 52, 0, 0]);
    for half in [52_u16, 32, 1, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // Load all of it, readable and executable.
    words(&mut elf, &[1, 0, BASE, BASE, size, size, 5, 0x1000]);
    elf.extend_from_slice(&CODE);
    elf
}

#[test]
fn seccomp_architectures() {
    let run = |change: Value| {
        let mount = json!({"destination": "/p32", "type": "bind", "source": volume("p32"), "options": ["bind"]});
        sh("/p32; echo code $?").file("p32", program_of_32_bits()).mount(mount).with(change).out()
    };
    assert_eq!(run(json!({})), "code 42\n", "the guest runs 32-bit programs");
    let arches = |arches: Value| {
        let mut change = no_mkdir("SCMP_ACT_ERRNO", Value::Null);
        change["linux"]["seccomp"]["architectures"] = arches;
        change
    };
    let both = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    assert_eq!(run(arches(both)), "code 42\n");
    let killed = format!("code {}\n", 128 + SIGSYS);
    assert_eq!(run(arches(json!(["SCMP_ARCH_X86_64"]))), killed, "not listed is not let in");
    assert_eq!(
        run(no_mkdir("SCMP_ACT_ERRNO", Value::Null)),
        killed,
        "none listed is the native one"
    );
    let refused = sh("true").with(arches(json!(["SCMP_ARCH_VAX"]))).refused();
    assert!(refused.contains("SCMP_ARCH_VAX"), "{refused}");
}

#[test]
fn seccomp_flags() {
    let flags = |flags: Value| {
        let mut change = no_mkdir("SCMP_ACT_ERRNO", Value::Null);
        change["linux"]["seccomp"]["flags"] = flags;
        sh("! mkdir /x 2>/dev/null").with(change)
    };
    let all =
        ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"];
    flags(json!(all)).out();
    for unknown in ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", "SECCOMP_FILTER_FLAG_NOPE"] {
        let refused = flags(json!([unknown])).refused();
        assert!(refused.contains(unknown), "{refused}");
    }
}

#[test]
fn seccomp_notification_is_refused() {
    let refused = sh("true").with(no_mkdir("SCMP_ACT_NOTIFY", Value::Null)).refused();
    assert!(refused.contains("SCMP_ACT_NOTIFY"), "{refused}");
    let listener = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock",
        "listenerMetadata": "x"});
    let refused = sh("true").with(profile(listener)).refused();
    assert!(refused.contains("linux.seccomp.listenerPath"), "{refused}");
}

#[test]
fn seccomp_profiles_of_real_size() {
    // As container engines write them: an error for all but some hundred names, both widths.
    let table = include_str!("../../../guest-agent/src/seccomp/syscalls.rs");
    let names: Vec<&str> = table
        .split("(\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .filter(|name| !name.starts_with("mkdir"))
        .collect();
    assert!(names.len() > 400, "{}", names.len());
    let conditional = json!({"names": ["personality", "clone", "socket"], "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": 2_114_060_288_u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]});
    let seccomp = json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [conditional, {"names": names, "action": "SCMP_ACT_ALLOW"}],
    });
    let outcome = sh("ls / | grep -c proc; mkdir /x").with(profile(seccomp)).run();
    assert_eq!(outcome.out, "1\n", "{outcome:?}");
    assert!(outcome.err.contains("not implemented"), "{}", outcome.err);
}

#[test]
fn seccomp_holds_for_further_processes() {
    let mut running =
        sh("echo ready; read x").with(no_mkdir("SCMP_ACT_ERRNO", json!(28))).start().unwrap();
    running.until("ready");
    let exec = running.exec(json!({"args": ["mkdir", "/x"]})).unwrap();
    assert!(exec.err.contains("No space left"), "{exec:?}");
}

#[test]
fn seccomp_profiles_that_cannot_be() {
    let refused = sh("true").with(profile(json!({"defaultAction": "SCMP_ACT_SHRUG"}))).refused();
    assert!(refused.contains("SCMP_ACT_SHRUG"), "{refused}");
    // More than the kernel's 4096 instructions.
    let args: Vec<Value> = (0..2000)
        .map(|n| {
            json!({"names": ["kill"], "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 1, "value": n, "op": "SCMP_CMP_EQ"}]})
        })
        .collect();
    let refused = sh("true").with(but(json!(args))).refused();
    assert!(refused.contains("linux.seccomp"), "{refused}");
    // Nothing is allowed, the program neither.
    let nothing = sh("true").with(profile(json!({"defaultAction": "SCMP_ACT_ERRNO"}))).run();
    assert_ne!((nothing.code, nothing.signal), (0, 0));
    let nothing = sh("true").with(profile(json!({"defaultAction": "SCMP_ACT_KILL_PROCESS"}))).run();
    assert_eq!(nothing.signal, SIGSYS);
}
