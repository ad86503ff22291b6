use super::*;

fn parsed(text: &str) -> Values {
    parse(Path::new("/etc/mvm/mvm.toml"), text).unwrap()
}

fn refused(text: &str) -> String {
    let error = parse(Path::new("/etc/mvm/mvm.toml"), text).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[test]
fn every_key_is_taken() {
    let text = "\
        # A comment.\n\
        engine = \"emu\"\n\
        require-hardware = false\n\
        cpu = 'v2'\n\
        cpus = 1.5\n\
        memory = \"1g\"\n\
        hugepages = \"thp\"\n\
        kernel = \"vmlinux\"\n\
        initrd = \"/boot/initrd\"\n\
        cmdline = \"quiet\"\n\
        boot-timeout = 5\n\
        stop-timeout = 6\n\
        network = \"cni:web\"\n\
        debug-console = true\n\
        emu.tier = \"jit\"\n\
        memory-max = \"4g\"\n";
    let values = parsed(text);
    let origin = |line| Origin::File { path: "/etc/mvm/mvm.toml".into(), line };
    assert_eq!(values.engine, Some(Setting { value: EngineChoice::Emu, origin: origin(2) }));
    assert_eq!(values.require_hardware, Some(Setting { value: false, origin: origin(3) }));
    assert_eq!(values.cpu, Some(Setting { value: CpuModel::V2, origin: origin(4) }));
    assert_eq!(values.cpus, Some(Setting { value: "1.5".into(), origin: origin(5) }));
    assert_eq!(values.memory.unwrap().value, "1g");
    assert_eq!(
        values.hugepages,
        Some(Setting { value: HugePages::Transparent, origin: origin(7) })
    );
    assert_eq!(values.kernel.unwrap().value, Path::new("/etc/mvm/vmlinux"), "beside the file");
    assert_eq!(values.initrd.unwrap().value, Path::new("/boot/initrd"));
    assert_eq!(values.cmdline.unwrap().value, "quiet");
    assert_eq!(values.boot_timeout.unwrap().value, 5);
    assert_eq!(values.stop_timeout, Some(Setting { value: 6, origin: origin(12) }));
    assert_eq!(values.network.unwrap().value, "cni:web");
    assert_eq!(values.debug_console, Some(Setting { value: true, origin: origin(14) }));
    assert_eq!(values.tier, Some(Setting { value: EmuTier::Jit, origin: origin(15) }));
    assert_eq!(values.memory_max.unwrap().value, "4g");
    for key in KEYS {
        assert!(text.contains(&format!("{key} = ")), "{key}");
    }
    assert_eq!(parsed(""), Values::default());
    assert_eq!(parsed("memory = 536870912").memory.unwrap().value, "536870912");
}

#[test]
fn unknown_keys_are_named_with_line_and_the_closest_one() {
    for (text, line, key, meant) in [
        ("engin = 1", 1, "engin", "`engine` is the closest"),
        ("\n\ncpus = 1\nrequire_hardware = true", 4, "require_hardware", "`require-hardware`"),
        ("Memory = 1", 1, "Memory", "`memory`"),
        ("\"boot timeout\" = 1", 1, "boot timeout", "`boot-timeout`"),
        ("[run]\nengine = \"emu\"", 1, "run", "the keys are engine, require-hardware"),
        ("zzz = 1", 1, "zzz", "the keys are"),
    ] {
        let error = refused(text);
        let start = format!("/etc/mvm/mvm.toml:{line}: unknown key `{key}`; ");
        assert!(error.starts_with(&start) && error.contains(meant), "{error}");
    }
}

#[test]
fn bad_values_are_named_with_line_and_rule() {
    for (text, start, word) in [
        ("\nengine = \"tcg\"", "/etc/mvm/mvm.toml:2: engine: ", "auto, kvm or emu"),
        ("emu.tier = \"fast\"", "/etc/mvm/mvm.toml:1: emu.tier: ", "interp or jit"),
        ("cpu = \"v9\"", "/etc/mvm/mvm.toml:1: cpu: ", "v9"),
        ("cpus = 0", "/etc/mvm/mvm.toml:1: cpus: ", "0.01 to 64"),
        ("cpus = nan", "/etc/mvm/mvm.toml:1: cpus: ", "CPUs"),
        ("memory = \"lots\"", "/etc/mvm/mvm.toml:1: memory: ", "lots"),
        ("\nhugepages = \"1g\"", "/etc/mvm/mvm.toml:2: hugepages: ", "none, thp or 2m"),
        ("memory = -5", "/etc/mvm/mvm.toml:1: memory: ", "-5"),
        ("\n\nrequire-hardware = \"yes\"", "/etc/mvm/mvm.toml:3: ", "boolean"),
        ("stop-timeout = -1", "/etc/mvm/mvm.toml:1: ", "-1"),
        ("stop-timeout = 4294967296", "/etc/mvm/mvm.toml:1: ", "4294967296"),
        ("network = \"host\"", "/etc/mvm/mvm.toml:1: network: ", "host"),
        ("debug-console = 1", "/etc/mvm/mvm.toml:1: ", "boolean"),
        ("cmdline = [1]", "/etc/mvm/mvm.toml:1: ", "string"),
        ("memory = { a = 1 }", "/etc/mvm/mvm.toml:1: ", "a string or a number"),
    ] {
        let error = refused(text);
        assert!(error.starts_with(start) && error.contains(word), "{error}");
    }
}

#[test]
fn what_is_not_toml_is_named_with_line() {
    for (text, line) in [
        ("engine =", 1),
        ("\nengine emu", 2),
        ("cpus = 1\ncpus = 2", 2),
        ("\n\n]]]", 3),
        ("a = \"", 1),
    ] {
        let error = refused(text);
        assert!(error.starts_with(&format!("/etc/mvm/mvm.toml:{line}: ")), "{text:?}: {error}");
    }
}

#[test]
fn whatever_stands_there_is_taken_or_refused_in_one_line() {
    let good = "engine = 'emu'\ncpus = 1.5\nrequire-hardware = true\nmemory = \"1g\"\n# x\n";
    let pieces =
        ["=", "\"", "'''", "[", "]", "{", "\n", "\r", "\0", "é", "1e9999", "-", "nan", "0x"];
    // A linear congruential generator: the same texts each time.
    let mut seed = 1u64;
    let mut below = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % n
    };
    let mut taken = 0;
    for _ in 0..20_000 {
        let mut text: Vec<char> = good.chars().collect();
        for _ in 0..=below(3) {
            let at = below(text.len() + 1);
            match below(3) {
                0 => text.truncate(at),
                1 => drop(text.splice(at..at, pieces[below(pieces.len())].chars())),
                _ => drop(text.splice(at..text.len().min(at + 1), [])),
            }
        }
        let text = String::from_iter(text);
        match parse(Path::new("/etc/mvm/mvm.toml"), &text) {
            Ok(_) => taken += 1,
            Err(e) => {
                let line = e.to_string();
                assert_eq!(line.lines().count(), 1, "{text:?}: {line:?}");
                assert!(line.starts_with("/etc/mvm/mvm.toml:"), "{line}");
                assert!(!line.contains(char::is_control), "{text:?}: {line:?}");
            }
        }
    }
    assert!((1000..19_000).contains(&taken), "{taken}");
}

#[test]
fn files_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mvm.toml");
    assert!(read(&path).unwrap().is_none());
    assert!(matches!(read(dir.path()), Err(Error::NotAFile { .. })));
    // Nobody writes to it.
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(read(&path), Err(Error::NotAFile { .. })));
    assert!(matches!(read(Path::new("/dev/zero")), Err(Error::TooLong { .. })));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, " ".repeat(70_000)).unwrap();
    assert!(matches!(read(&path), Err(Error::TooLong { .. })));
    std::fs::write(&path, b"# ok\n# \xff\n").unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(error.ends_with(":2: this is not UTF-8"), "{error}");
}
