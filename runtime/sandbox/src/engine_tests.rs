use mvm_engine::probe::facts::{
    Device, DeviceFile, Facts, Host, Instruction, Kvm, Loop, Measured, RunEnd, Trial, User,
};
use mvm_engine::probe::judge;

use nix::libc;

use super::*;

/// A host whose KVM ran the trial like this.
fn host(trial: Trial) -> Probe {
    let file = DeviceFile { is_kvm: true, ..DeviceFile::default() };
    judge(Facts {
        host: Host::default(),
        user: User::default(),
        device: Device { path: "/dev/kvm".into(), file: Some(file), errno: None },
        kvm: Some(Kvm { api_version: 12, missing: Vec::new(), trial }),
    })
}

fn at_mips(mips: u64) -> Probe {
    let integer = Loop { end: RunEnd::Done, instructions: mips * 1000, cpu_ns: 1_000_000 };
    let instructions = vec![Instruction { name: "pxor".into(), end: RunEnd::Done }];
    host(Trial::Ran(Measured { integer, instructions }))
}

fn hardware() -> Probe {
    at_mips(4000)
}

fn pagetable() -> Probe {
    at_mips(1)
}

fn busy() -> Probe {
    host(Trial::NoVm { errno: libc::EBUSY })
}

fn wish(choice: EngineChoice) -> Wish {
    Wish { choice, ..Wish::default() }
}

const AUTO: EngineChoice = EngineChoice::Auto;
const KVM: EngineChoice = EngineChoice::Kvm;
const EMU: EngineChoice = EngineChoice::Emu;

#[test]
fn hardware_is_taken_without_a_word() {
    for choice in [AUTO, KVM] {
        for guest in [Guest::Linux, Guest::Unikernel] {
            let wish = Wish { require_hardware: Some("x".into()), ..wish(choice) };
            let decision = choose(&wish, guest, &hardware());
            assert_eq!(decision, Ok(Decision::Kvm { notice: None }));
        }
    }
}

#[test]
fn auto_takes_nothing_less_than_hardware() {
    for guest in [Guest::Linux, Guest::Unikernel] {
        for probe in [pagetable(), busy()] {
            assert_eq!(choose(&wish(AUTO), guest, &probe), Ok(Decision::Fallback));
        }
    }
}

#[test]
fn kvm_is_kvm_or_an_error_with_the_reason() {
    let error = choose(&wish(KVM), Guest::Linux, &pagetable()).unwrap_err().to_string();
    assert!(error.contains("pagetable hypervisor") && error.contains("1.0 MIPS"), "{error}");
    assert!(error.contains("--engine emu") && error.contains("--force"), "{error}");
    for guest in [Guest::Linux, Guest::Unikernel] {
        let error = choose(&wish(KVM), guest, &busy()).unwrap_err().to_string();
        assert!(error.contains("another hypervisor") && error.contains("unload"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
}

#[test]
fn unikernels_may_run_where_ring_0_is_interpreted() {
    let decision = choose(&wish(KVM), Guest::Unikernel, &pagetable()).unwrap();
    let Decision::Kvm { notice: Some(notice) } = decision else { panic!("{decision:?}") };
    assert!(notice.contains("ring 3") && notice.lines().count() == 1, "{notice}");
}

#[test]
fn force_tries_what_can_be_tried() {
    let force = Wish { force: true, ..wish(KVM) };
    let forced = |probe: &Probe| {
        matches!(choose(&force, Guest::Linux, probe), Ok(Decision::Kvm { notice: Some(_) }))
    };
    assert!(forced(&pagetable()) && forced(&host(Trial::Stuck)));
    assert!(forced(&host(Trial::Failed { step: "x".into(), errno: 1 })));
    // There is nothing to try it on.
    assert!(choose(&force, Guest::Linux, &busy()).is_err());
    for choice in [AUTO, EMU] {
        let wish = Wish { force: true, ..wish(choice) };
        assert_eq!(check(&wish), Err(Error::NothingToForce));
    }
    assert_eq!(check(&force), Ok(()));
}

#[test]
fn required_hardware_is_named_with_who_requires_it() {
    let by = || Some("require-hardware in /etc/mvm/mvm.toml:3".to_owned());
    for (choice, force) in [(AUTO, false), (KVM, false), (KVM, true)] {
        for guest in [Guest::Linux, Guest::Unikernel] {
            for probe in [pagetable(), busy()] {
                let wish = Wish { force, require_hardware: by(), ..wish(choice) };
                let error = choose(&wish, guest, &probe).unwrap_err().to_string();
                assert!(error.contains("mvm.toml:3") && error.contains(&probe.finding.text));
            }
        }
    }
    let wish = Wish { require_hardware: by(), ..wish(EMU) };
    assert!(check(&wish).unwrap_err().to_string().contains("mvm.toml:3"));
}

#[test]
fn emulation_that_was_asked_for_looks_at_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::at(dir.path());
    let outlook = look(&layout, wish(EMU)).unwrap();
    assert!(outlook.host.is_none());
    let selection = outlook.decide(Guest::Linux).unwrap();
    assert_eq!((selection.engine.name(), selection.fallback), ("emu", false));
    assert!(selection.reason.is_empty() && selection.notice.is_none());
}

#[test]
fn what_auto_does_not_say_of_this_host_it_says_of_none() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::at(dir.path());
    layout.prepare().unwrap();
    let selection = look(&layout, wish(AUTO)).unwrap().decide(Guest::Linux).unwrap();
    assert_eq!(selection.fallback, selection.engine.name() == "emu");
    assert!(!selection.reason.is_empty());
}
