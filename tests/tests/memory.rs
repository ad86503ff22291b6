//! Machines that grow and shrink while they run.

use mvm_tests::cri::Cri;
use mvm_tests::cri::messages::LinuxContainerResources;
use mvm_tests::{Containerd, Finished, World, eventually};
use protobuf::MessageField;

const MIB: u64 = 1 << 20;
/// What a guest may keep of what it was asked to give back, since its kernel has something there that cannot be moved: a tenth
/// of what it got.
const KEPT: u64 = 70 * MIB;

/// Has dd hold that many MiB at once, all of them written.
fn hold(mib: u64) -> String {
    format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>/dev/null && echo held")
}

/// Bytes of memory that the guest's kernel says it has.
fn total(meminfo: &Finished) -> u64 {
    let text = meminfo.out();
    let mut words = text.split_whitespace().skip_while(|word| *word != "MemTotal:").skip(1);
    words.next().and_then(|kib| kib.parse::<u64>().ok()).expect("the guest's memory") << 10
}

fn number(value: &serde_json::Value, pointer: &str) -> u64 {
    value
        .pointer(pointer)
        .and_then(serde_json::Value::as_u64)
        .unwrap_or_else(|| panic!("{pointer}"))
}

#[test]
fn a_machine_grows_when_it_is_told_to_and_gives_back_what_it_can() {
    let world = World::small();
    let run = ["run", "-d", "--name", "grows", "-m", "192m", "--memory-max", "1g", "busybox"];
    world.mvm(&[&run[..], &["sleep", "100000"]].concat()).expect_code(0);
    let total = || total(&world.mvm(&["exec", "grows", "cat", "/proc/meminfo"]).expect_code(0));
    let stats = || {
        let stats = world.mvm(&["stats", "--format", "json", "grows"]).expect_code(0);
        serde_json::from_str::<serde_json::Value>(&stats.out()).expect("JSON")
    };
    let exec = |script: &str| world.mvm(&["exec", "grows", "sh", "-c", script]);
    let small = total();
    assert!(small < 192 * MIB);
    assert_eq!(number(&stats(), "/memory"), 192 * MIB);
    assert_ne!(exec(&hold(500)).out(), "held\n", "more than there is");

    world.mvm(&["update", "--memory", "900m", "grows"]).expect_code(0);
    assert_eq!(total() - small, 708 * MIB, "all of it, in whole pieces of 2 MiB");
    let size = &world.inspect("grows")["memory_size"];
    assert_eq!(number(size, "/now"), 900 * MIB);
    assert_eq!(number(size, "/started"), 192 * MIB);
    assert_eq!(number(size, "/max"), (192 + 896) * MIB);
    assert_eq!(exec(&hold(500)).expect_code(0).out(), "held\n");
    let before = stats();
    assert_eq!(number(&before, "/memory"), 900 * MIB);
    assert_eq!(number(&before, "/devices/mvm-mem.plugged"), 708 * MIB);

    let refused = world.mvm(&["update", "--memory", "4g", "grows"]).expect_code(125);
    assert!(refused.err().contains("4096 MiB") && refused.err().contains("memory-max"));
    world.mvm(&["update", "--memory", "192m", "grows"]).expect_code(0);
    eventually("the guest to have given it back", || total() <= small + KEPT);
    eventually("the host to have it back", || {
        let stats = stats();
        number(&stats, "/memory") <= 192 * MIB + KEPT
            && number(&stats, "/host/guest_resident") <= 192 * MIB + KEPT
    });
    // And once more.
    world.mvm(&["update", "--memory", "320m", "grows"]).expect_code(0);
    assert_eq!(total() - small, 128 * MIB);
    world.mvm(&["rm", "-f", "grows"]).expect_code(0);
}

#[test]
fn a_machine_that_was_not_made_to_grow_says_so() {
    let world = World::small();
    world.mvm(&["run", "-d", "--name", "fixed", "busybox", "sleep", "100000"]).expect_code(0);
    let refused = world.mvm(&["update", "-m", "1g", "fixed"]).expect_code(125);
    assert!(refused.err().contains("memory-max"), "{}", refused.err());
    world.mvm(&["rm", "-f", "fixed"]).expect_code(0);
    let both = ["run", "--rm", "--memory-max", "1g", "--hugepages", "2m", "busybox", "true"];
    let refused = world.mvm(&both).expect_code(125);
    assert!(refused.err().contains("huge pages"), "{}", refused.err());
    let less = ["run", "--rm", "--memory", "1g", "--memory-max", "512m", "busybox", "true"];
    let refused = world.mvm(&less).expect_code(125);
    assert!(refused.err().contains("--memory-max 512m: less than"), "{}", refused.err());
}

#[test]
fn a_pods_machine_grows_with_the_limits_of_its_containers() {
    let Some(ctd) = Containerd::with_cri() else { return };
    let cri = Cri::new(&ctd);
    let limit = |bytes: u64| LinuxContainerResources {
        memory_limit_in_bytes: i64::try_from(bytes).expect("a limit"),
        ..Default::default()
    };
    let mut config = cri.pod_config("grows");
    // As the kubelet sums it up.
    config.linux.mut_or_insert_default().resources = MessageField::some(limit(256 * MIB));
    let pod = cri.run_pod(config);
    let mut config = cri.container_config("first", "echo up; sleep 100000");
    config.linux.mut_or_insert_default().resources = MessageField::some(limit(256 * MIB));
    let id = cri.start(&pod, config);
    eventually("its output", || cri.log(&pod, "first") == "up\n");
    let total = || total(&cri.exec(&id, "cat /proc/meminfo").expect_code(0));
    let small = total();
    assert!(small < 352 * MIB, "its limit, and what the guest needs itself: {small}");
    assert_eq!(cri.exec(&id, &hold(300)).code, 137, "ended for want of memory");

    cri.update(&id, limit(1024 * MIB)).expect("a higher limit");
    assert_eq!(total() - small, 768 * MIB);
    assert_eq!(cri.exec(&id, &hold(700)).expect_code(0).out(), "held\n");

    cri.update(&id, limit(256 * MIB)).expect("a lower limit");
    assert_eq!(cri.exec(&id, &hold(300)).code, 137, "the limit holds again");
    eventually("the guest to have given it back", || total() <= small + KEPT);
    let machine = ctd.mvm(&["ps", "-q"]).expect_code(0).out();
    eventually("the machine to be as small as before", || {
        let about = ctd.mvm(&["inspect", machine.trim()]).expect_code(0).out();
        let about: serde_json::Value = serde_json::from_str(&about).expect("JSON");
        number(&about, "/0/memory_size/now") <= 352 * MIB + KEPT
    });

    // A container that comes later finds room, too.
    let mut config = cri.container_config("second", "echo up; sleep 100000");
    config.linux.mut_or_insert_default().resources = MessageField::some(limit(512 * MIB));
    let second = cri.start(&pod, config);
    assert_eq!(total() - small, 512 * MIB);
    assert_eq!(cri.exec(&second, &hold(400)).expect_code(0).out(), "held\n");
    cri.stop(&second, 0);
    cri.remove(&second);
    eventually("its memory to be given back", || total() <= small + KEPT);
    cri.remove_pod(&pod);
    ctd.expect_nothing_left();
}
