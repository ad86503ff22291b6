//! The probe on the host of the tests, whatever that is: the answer has to be consistent.

use std::fs;

use super::facts::RunEnd;
use super::*;

#[test]
fn this_host_has_one_consistent_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("probe.json");
    let (first, device) = examine(&Sources::default(), Some(&Cache::new(&path)));
    assert_eq!(first.facts.device.errno.is_some() || device.is_none(), first.facts.kvm.is_none());
    let Some(kvm) = &first.facts.kvm else {
        assert_eq!((first.verdict, first.mips), (Verdict::Unusable, None));
        assert!(!path.exists());
        return;
    };
    if let Trial::Ran(measured) = &kvm.trial
        && measured.integer.end == RunEnd::Done
    {
        let mips = first.mips.unwrap();
        assert!(mips > 0.01 && mips < 1e6, "{mips}");
        assert_eq!(first.verdict == Verdict::Usable, first.finding.kind == Kind::Works);
        // The second answer is the first's, out of the cache, to the last digit of the figure.
        let (second, _) = examine(&Sources::default(), Some(&Cache::new(&path)));
        assert_eq!(second, first);
        // Renewing measures, and replaces the file.
        fs::write(&path, "{").unwrap();
        let (third, _) = examine(&Sources::default(), Some(&Cache::renewed(&path)));
        assert_eq!(third.verdict, first.verdict);
        assert!(fs::metadata(&path).unwrap().len() > 10);
    }
}

#[test]
fn a_device_elsewhere_is_absent() {
    let dir = tempfile::tempdir().unwrap();
    let sources = Sources { device: dir.path().join("kvm"), ..Sources::default() };
    let (probe, device) = examine(&sources, None);
    assert!(device.is_none());
    assert_eq!(probe.verdict, Verdict::Unusable);
    assert!(!probe.finding.remedy.is_empty());
}
