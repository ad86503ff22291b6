use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};

fn args(list: &[&str]) -> Box<RunArgs> {
    let all = ["mvm", "run"].iter().chain(list).chain(&["image"]);
    match Cli::try_parse_from(all).unwrap().command {
        Command::Run(args) => args,
        other => panic!("{other:?}"),
    }
}

fn config(text: &str) -> Config {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mvm.toml");
    std::fs::write(&path, text).unwrap();
    Config::load(&Places::Given(path)).unwrap()
}

fn settings(flags: &[&str], text: &str) -> Settings {
    Settings::of(Values::of_flags(&args(flags)), &config(text))
}

#[test]
fn nobody_says_anything() {
    let settings = settings(&[], "");
    assert_eq!((settings.cpus.value.as_str(), settings.memory.value.as_str()), ("1", "512m"));
    assert_eq!((settings.boot_timeout.value, settings.stop_timeout.value), (120, 10));
    assert_eq!(settings.wish(false), Wish::default());
    assert_eq!((settings.network.value.as_str(), settings.debug_console.value), ("none", false));
    let keys: Vec<_> = settings.list().iter().map(|(key, ..)| *key).collect();
    assert_eq!(keys, file::KEYS);
    assert!(settings.list().iter().all(|(_, _, origin)| **origin == Origin::Default));
}

#[test]
fn flags_go_before_files() {
    let text = "engine = 'emu'\ncpus = 2\nmemory = '1g'\ncpu = 'v2'\nstop-timeout = 1";
    let flags = ["--engine=auto", "--cpus=3", "--cpu=v3", "--boot-timeout=7"];
    let settings = settings(&flags, text);
    assert_eq!(
        (settings.engine.value, &settings.engine.origin),
        (EngineChoice::Auto, &Origin::Flag)
    );
    assert_eq!((settings.cpus.value.as_str(), settings.memory.value.as_str()), ("3", "1g"));
    assert_eq!((settings.cpu.value, settings.boot_timeout.value), (Some(CpuModel::V3), 7));
    assert_eq!(settings.stop_timeout.value, 1);
    let max = "memory-max = '4g'";
    assert_eq!(self::settings(&[], max).memory_max.value.as_deref(), Some("4g"));
    assert_eq!(self::settings(&["--memory-max=2g"], max).memory_max.value.as_deref(), Some("2g"));
    let network = "network = 'cni:web'";
    assert_eq!(self::settings(&[], network).network.value, "cni:web");
    assert_eq!(self::settings(&["--network=none"], network).network.value, "none");
    assert_eq!(settings.cpus.named("cpus"), "--cpus");
    assert!(settings.memory.named("memory").starts_with("memory in /"));
    assert!(settings.memory.named("memory").ends_with("mvm.toml:3"));
}

#[test]
fn a_flag_names_engine_and_tier() {
    let both = settings(&["--engine=emu:jit"], "engine = 'kvm'\nemu.tier = 'interp'");
    assert_eq!((both.engine.value, both.tier.value), (EngineChoice::Emu, EmuTier::Jit));
    let both = settings(&["--engine=emu:interp"], "emu.tier = 'jit'");
    assert_eq!(both.wish(false).tier, EmuTier::Interp);
    let without = settings(&["--engine=emu"], "emu.tier = 'interp'");
    assert_eq!(without.tier.value, EmuTier::Interp, "the file's where the flag says nothing");
    assert_eq!(settings(&[], "").tier.value, EmuTier::Jit);
}

#[test]
fn the_environment_stands_between() {
    let variable = Setting { value: EngineChoice::Kvm, origin: Origin::Variable("MVM_ENGINE") };
    let environment = || Values { engine: Some(variable.clone()), ..Values::default() };
    let config = config("engine = 'emu'");
    assert_eq!(Settings::of(environment(), &config).engine, variable);
    let both = Values::of_flags(&args(&["--engine=auto"])).over(environment());
    assert_eq!(Settings::of(both, &config).engine.value, EngineChoice::Auto);
}

#[test]
fn required_hardware_tells_who_requires_it() {
    assert_eq!(
        settings(&[], "require-hardware = false").wish(true),
        Wish { force: true, ..Wish::default() }
    );
    let wish = settings(&[], "\nrequire-hardware = true").wish(false);
    assert!(wish.require_hardware.unwrap().ends_with("mvm.toml:2"));
    let wish = settings(&["--require-hardware"], "").wish(false);
    assert_eq!(wish.require_hardware.as_deref(), Some("--require-hardware"));
    let off = settings(&["--require-hardware=false"], "require-hardware = true").wish(false);
    assert_eq!(off.require_hardware, None);
}

#[test]
fn any_time_for_the_start_can_be_added_to_the_clock() {
    let limit = |text: &str| settings(&["--boot-timeout", text], "").boot_limit();
    assert_eq!(limit("7").as_secs(), 7);
    let longest = limit(&u64::MAX.to_string());
    assert!(std::time::Instant::now().checked_add(longest).is_some());
}
