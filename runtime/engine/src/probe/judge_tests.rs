use super::super::facts::{Instruction, Loop, User, Virtualization};
use super::*;

const VMX: Option<Virtualization> = Some(Virtualization::Vmx);
const SVM: Option<Virtualization> = Some(Virtualization::Svm);

/// Bare metal without KVM, asked by alice.
fn facts() -> Facts {
    Facts {
        host: Host::default(),
        user: User { uid: 1000, name: Some("alice".into()), listed_in_group: false },
        device: Device { path: "/dev/kvm".into(), file: None, errno: Some(libc::ENOENT) },
        kvm: None,
    }
}

fn with_host(change: impl FnOnce(&mut Host)) -> Probe {
    let mut facts = facts();
    change(&mut facts.host);
    judge(facts)
}

/// A device that does not open.
fn with_file(errno: i32, change: impl FnOnce(&mut DeviceFile, &mut User)) -> Probe {
    let mut facts = facts();
    let mut file =
        DeviceFile { is_kvm: true, mode: 0o660, uid: 0, gid: 993, group: Some("kvm".into()) };
    change(&mut file, &mut facts.user);
    facts.device = Device { errno: Some(errno), file: Some(file), ..facts.device };
    judge(facts)
}

/// A device that opens.
fn with_kvm(host: Host, trial: Trial) -> Probe {
    let file = DeviceFile { is_kvm: true, ..DeviceFile::default() };
    let device = Device { path: "/dev/kvm".into(), file: Some(file), errno: None };
    let kvm = Kvm { api_version: 12, missing: Vec::new(), trial };
    judge(Facts { host, device, kvm: Some(kvm), ..facts() })
}

fn measured(instructions: u64, cpu_ns: u64, pxor: RunEnd) -> Trial {
    Trial::Ran(Measured {
        integer: Loop { end: RunEnd::Done, instructions, cpu_ns },
        instructions: vec![
            Instruction { name: "pxor".into(), end: pxor.clone() },
            Instruction { name: "cmpxchg16b".into(), end: pxor },
        ],
    })
}

#[track_caller]
fn is(probe: &Probe, verdict: Verdict, kind: Kind, text: &[&str], remedy: &[&str]) {
    let Finding { kind: found, text: said, remedy: advice, .. } = &probe.finding;
    assert_eq!((probe.verdict, *found), (verdict, kind), "{said}");
    for word in text {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
    for word in remedy {
        assert!(advice.contains(word), "no {word:?} in {advice:?}");
    }
    assert_eq!((said.lines().count(), said.ends_with('.')), (1, false));
    assert!(advice.lines().count() <= 1);
    assert_eq!(advice.is_empty(), *found == Kind::Works, "a remedy for all that is wrong");
}

#[test]
fn no_sign_of_virtualization() {
    let none = judge(facts());
    is(&none, Verdict::Unusable, Kind::NoHardware, &["/dev/kvm", "vmx", "svm"], &["BIOS"]);
    let nested = with_host(|h| h.hypervisor = true);
    is(
        &nested,
        Verdict::Unusable,
        Kind::NestedOff,
        &["virtual machine"],
        &["nested", "bare-metal"],
    );
    // Firmware that switches it off leaves CPUID alone; of a virtual CPUID nobody knows.
    let off = with_host(|h| h.cpuid = SVM);
    is(&off, Verdict::Unusable, Kind::FirmwareDisabled, &["AMD-V", "firmware"], &["BIOS"]);
    let nested = with_host(|h| (h.cpuid, h.hypervisor) = (VMX, true));
    assert_eq!(nested.finding.kind, Kind::NestedOff);
}

#[test]
fn no_device_though_the_processor_could() {
    let intel = with_host(|h| h.virtualization = VMX);
    is(&intel, Verdict::Unusable, Kind::ModuleMissing, &["kvm_intel"], &["modprobe kvm_intel"]);
    let amd = with_host(|h| h.virtualization = SVM);
    is(&amd, Verdict::Unusable, Kind::ModuleMissing, &["kvm_amd"], &["modprobe kvm_amd"]);
    // The general module alone is not enough.
    let half = with_host(|h| (h.virtualization, h.modules) = (VMX, vec!["kvm".into()]));
    assert_eq!(half.finding.kind, Kind::ModuleMissing);
    let loaded = with_host(|h| (h.virtualization, h.modules) = (VMX, vec!["kvm_intel".into()]));
    is(&loaded, Verdict::Unusable, Kind::NoDevice, &["kvm_intel is loaded"], &["mknod"]);
    let rival = with_host(|h| (h.virtualization, h.rivals) = (VMX, vec!["vboxdrv".into()]));
    is(&rival, Verdict::Unusable, Kind::Busy, &["vboxdrv", "VT-x"], &["modprobe -r vboxdrv"]);
    let hidden = with_host(|h| (h.virtualization, h.device_in_kernel) = (VMX, true));
    is(
        &hidden,
        Verdict::Unusable,
        Kind::DeviceHidden,
        &["no /dev/kvm here"],
        &["--device /dev/kvm"],
    );
}

#[test]
fn permission_remedies_fit_the_file_and_the_user() {
    let join = with_file(libc::EACCES, |_, _| {});
    let advice = ["usermod -aG kvm alice", "log in again"];
    is(&join, Verdict::Unusable, Kind::NoPermission, &["group kvm"], &advice);
    let again = with_file(libc::EACCES, |_, user| user.listed_in_group = true);
    is(&again, Verdict::Unusable, Kind::NoPermission, &["kvm"], &["newgrp kvm"]);
    assert!(!again.finding.remedy.contains("usermod"));
    let owner_only = with_file(libc::EACCES, |file, _| file.mode = 0o600);
    is(&owner_only, Verdict::Unusable, Kind::NoPermission, &["600"], &["chmod 660", "chgrp kvm"]);
    // Joining root's group would give away more than a device.
    let roots = with_file(libc::EACCES, |file, _| {
        (file.gid, file.group) = (0, Some("root".into()));
    });
    is(&roots, Verdict::Unusable, Kind::NoPermission, &["root"], &["chgrp kvm", "-aG kvm alice"]);
    let nameless = with_file(libc::EACCES, |file, user| {
        (file.group, user.name) = (None, None);
    });
    is(&nameless, Verdict::Unusable, Kind::NoPermission, &["993"], &["usermod -aG 993 1000"]);
    let unmapped = with_file(libc::EACCES, |file, _| file.gid = OVERFLOW_GID);
    is(&unmapped, Verdict::Unusable, Kind::NoPermission, &["namespace"], &["keep-groups"]);
}

#[test]
fn other_reasons_for_not_opening() {
    let denied = with_file(libc::EPERM, |_, _| {});
    is(&denied, Verdict::Unusable, Kind::Denied, &["not permitted"], &["--device /dev/kvm"]);
    let nothing = with_file(libc::ENODEV, |_, _| {});
    is(&nothing, Verdict::Unusable, Kind::ModuleMissing, &["/dev/kvm"], &["module"]);
    let odd = with_file(libc::EIO, |_, _| {});
    is(&odd, Verdict::Unusable, Kind::OpenFailed, &["/dev/kvm"], &["dmesg"]);
    let mut not_even_looked_at = facts();
    not_even_looked_at.device.errno = Some(libc::EACCES);
    assert_eq!(judge(not_even_looked_at).finding.kind, Kind::OpenFailed);
    let mut file = facts();
    file.device = Device { file: Some(DeviceFile::default()), errno: None, ..file.device };
    is(&judge(file), Verdict::Unusable, Kind::NotADevice, &["/dev/kvm"], &["mknod"]);
}

#[test]
fn hardware_is_usable() {
    let host = Host { virtualization: VMX, ..Host::default() };
    let probe = with_kvm(host, measured(4_000_000, 1_000_000, RunEnd::Done));
    is(&probe, Verdict::Usable, Kind::Works, &["VT-x", "4000 MIPS"], &[]);
    assert_eq!(probe.mips, Some(4000.0));
    // What counts is what was measured, not what /proc shows.
    let probe = with_kvm(Host::default(), measured(600_000, 1_000_000, RunEnd::Done));
    assert_eq!(probe.verdict, Verdict::Usable);
}

#[test]
fn interpreted_ring_0_is_not() {
    let host = Host { hypervisor: true, modules: vec!["kvm_pvm".into()], ..Host::default() };
    let no = RunEnd::InternalError { suberror: 1 };
    let probe = with_kvm(host, measured(1300, 1_000_000, no.clone()));
    let text = ["pagetable hypervisor", "1.3 MIPS"];
    is(&probe, Verdict::Interpreted, Kind::Interpreted, &text, &["nested virtualization"]);
    assert!(probe.finding.detail.contains("50 MIPS"), "{}", probe.finding.detail);
    assert!(probe.finding.detail.ends_with("cannot do pxor, cmpxchg16b"));
    // Either is enough, whatever the flags say.
    let host = || Host { virtualization: SVM, ..Host::default() };
    let slow = with_kvm(host(), measured(49_000, 1_000_000, RunEnd::Done));
    is(&slow, Verdict::Interpreted, Kind::Interpreted, &["at only 49 MIPS"], &["dmesg"]);
    assert!(!slow.finding.text.contains("pagetable") && !slow.finding.detail.contains("cannot"));
    let lame = with_kvm(host(), measured(4_000_000, 1_000_000, no));
    is(&lame, Verdict::Interpreted, Kind::Interpreted, &["cannot do pxor"], &["dmesg"]);
    let border = with_kvm(host(), measured(50_000, 1_000_000, RunEnd::Done));
    assert_eq!(border.verdict, Verdict::Usable);
}

#[test]
fn machines_that_do_not_come_up() {
    let intel = || Host { virtualization: VMX, ..Host::default() };
    let busy = with_kvm(intel(), Trial::NoVm { errno: libc::EBUSY });
    is(&busy, Verdict::Unusable, Kind::Busy, &["another hypervisor holds VT-x"], &["module"]);
    let vmware = Host { rivals: vec!["vmmon".into()], ..intel() };
    let busy = with_kvm(vmware, Trial::NoVm { errno: libc::EBUSY });
    is(&busy, Verdict::Unusable, Kind::Busy, &["(vmmon)"], &["modprobe -r vmmon"]);
    let odd = with_kvm(intel(), Trial::NoVm { errno: libc::EIO });
    is(&odd, Verdict::Unusable, Kind::VmRefused, &["machine"], &["firmware"]);
    let failed = Trial::Failed { step: "KVM_CREATE_VCPU".into(), errno: libc::ENOMEM };
    is(&with_kvm(intel(), failed), Verdict::Unusable, Kind::TrialFailed, &["VCPU"], &["dmesg"]);
    is(&with_kvm(intel(), Trial::Stuck), Verdict::Unusable, Kind::Overdue, &["time"], &["busy"]);
    for (end, kind) in [
        (RunEnd::Overdue, Kind::Overdue),
        (RunEnd::Shutdown, Kind::TrialFailed),
        (RunEnd::Wrong, Kind::TrialFailed),
        (RunEnd::FailEntry { reason: 0x8000_0021 }, Kind::TrialFailed),
        (RunEnd::InternalError { suberror: 1 }, Kind::TrialFailed),
        (RunEnd::Refused { errno: libc::EFAULT }, Kind::TrialFailed),
        (RunEnd::Unexpected { exit: "Nmi".into() }, Kind::TrialFailed),
    ] {
        let integer = Loop { end, instructions: 1, cpu_ns: 1 };
        let trial = Trial::Ran(Measured { integer, instructions: Vec::new() });
        let probe = with_kvm(intel(), trial);
        is(&probe, Verdict::Unusable, kind, &[], &[]);
        assert_eq!(probe.mips, None);
    }
}

#[test]
fn old_and_odd_interfaces() {
    let kvm = |api_version, missing: &[&str]| {
        let missing = missing.iter().map(|&m| m.to_owned()).collect();
        let trial = measured(4_000_000, 1_000_000, RunEnd::Done);
        let mut probe = with_kvm(Host::default(), Trial::Skipped);
        probe.facts.kvm = Some(Kvm { api_version, missing, trial });
        judge(probe.facts)
    };
    is(&kvm(11, &[]), Verdict::Unusable, Kind::WrongApi, &["version 11"], &["12"]);
    let lacking = kvm(12, &["KVM_CAP_SPLIT_IRQCHIP", "KVM_CAP_IRQFD"]);
    let text = ["KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_IRQFD"];
    is(&lacking, Verdict::Unusable, Kind::MissingExtensions, &text, &["4.12"]);
}

#[test]
fn facts_survive_json() {
    let probe = with_kvm(Host::default(), measured(1, 1, RunEnd::FailEntry { reason: 7 }));
    let json = serde_json::to_string(&probe.facts).unwrap();
    assert_eq!(serde_json::from_str::<Facts>(&json).unwrap(), probe.facts);
}
