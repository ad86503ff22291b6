//! Unikernels that containerd starts: by `ctr`, and in pods.

use std::time::Duration;

use mvm_tests::cri::{Cri, RUNNING};
use mvm_tests::{Containerd, Finished, World, containerd, eventually, run_with};

const IMAGE: &str = "docker.io/library/hello-unikernel:latest";

/// Longer than anything that is not stuck takes.
const PATIENCE: Duration = Duration::from_secs(240);

/// Ticks of its timer, far more than a test lasts.
const FOREVER: &str = "timer=100000000";

fn import(ctd: &Containerd) {
    ctd.import(&World::new().image_file("hello-unikernel"), IMAGE, ctd.snapshotter());
}

fn run(ctd: &Containerd, flags: &[&str], id: &str, args: &[&str]) -> Finished {
    run_with(ctd.run_image_command(flags, IMAGE, id, args), b"", PATIENCE)
}

#[test]
fn a_unikernel_is_a_task() {
    let ctd = containerd!();
    import(&ctd);
    // As its image says, and as the user does. Which code a status is: docs/unikernels.md.
    let hello = run(&ctd, &["--rm"], "u1", &[]).expect_code(0);
    assert!(hello.out().contains("Hello from a unikernel!"), "{}", hello.out());
    let exit = run(&ctd, &["--rm"], "u2", &["hello", "exit=3"]).expect_code(7);
    assert!(exit.out().contains("hello exit=3"), "{}", exit.out());
    // Annotations of the user's win over what the image says.
    let other = ["--rm", "--annotation", "com.urunc.unikernel.unikernelType=rust"];
    let none = ["--annotation", "com.urunc.unikernel.binary=/no-such-file"];
    let run_other = run(&ctd, &[&other[..], &none].concat(), "u3", &["hello"]);
    assert!(
        run_other.code != 0 && run_other.err().contains("/no-such-file"),
        "{}",
        run_other.err()
    );
    ctd.expect_nothing_left();
}

#[test]
fn all_that_is_in_its_image_can_be_its_disk() {
    let ctd = containerd!();
    import(&ctd);
    let whole = ["--annotation", "com.urunc.unikernel.mountRootfs=true"];
    let words = ["hello", "disk", "find={\"com.urunc.unikernel."];
    let out = run(&ctd, &[&["--rm"], &whole[..]].concat(), "u1", &words).expect_code(0).out();
    for line in [
        ": disk0.mount=/ hello disk",
        "disk 0: to be mounted at /",
        "is at the beginning of sector ",
    ] {
        assert!(out.contains(line), "no {line:?} in:\n{out}");
    }
    let odd = ["--annotation", "com.urunc.unikernel.blkMntPoint=/a/../b"];
    let refused = run(&ctd, &odd, "u2", &["hello"]);
    assert!(refused.code != 0 && refused.err().contains("blkMntPoint"), "{}", refused.err());
    ctd.expect_nothing_left();
}

#[test]
fn it_lives_until_it_is_killed_and_nobody_is_in_it() {
    let ctd = containerd!();
    import(&ctd);
    let log = format!("file://{}", ctd.path("u1.log").display());
    let flags = ["-d", "--memory-limit", "33554432", "--log-uri", &log];
    run(&ctd, &flags, "u1", &["hello", FOREVER]).expect_code(0);
    eventually("its output", || ctd.output("u1").contains("Hello"));
    assert_eq!(ctd.status("u1"), "RUNNING");
    let about = ctd.mvm(&["inspect", "default.u1"]).expect_code(0).out();
    let about: serde_json::Value = serde_json::from_str(&about).expect("JSON");
    assert_eq!(about[0]["memory"], 33_554_432, "{about}");
    let exec = ctd.exec("u1", "e1", "true", b"");
    assert!(exec.code != 0 && exec.err().contains("unikernel"), "{}", exec.err());
    let metrics = ctd.ctr(&["task", "metrics", "u1"]).expect_code(0).out();
    assert!(metrics.contains("memory"), "{metrics}");
    ctd.ctr(&["task", "pause", "u1"]).expect_code(0);
    assert_eq!(ctd.status("u1"), "PAUSED");
    ctd.ctr(&["task", "resume", "u1"]).expect_code(0);
    // A signal that ends nothing.
    assert_ne!(ctd.ctr(&["task", "kill", "-s", "SIGWINCH", "u1"]).code, 0);
    let metrics = ctd.mvm(&["metrics"]).expect_code(0).out();
    for want in
        ["containerd_id=\"u1\"", "mvm_boot_seconds_count{engine=", "mvm_machine_cpu_seconds_total{"]
    {
        assert!(metrics.contains(want), "no {want} in\n{metrics}");
    }
    ctd.ctr(&["task", "kill", "-s", "SIGTERM", "u1"]).expect_code(0);
    eventually("the end of the task", || ctd.status("u1") == "STOPPED");
    let removed = ctd.ctr(&["task", "rm", "u1"]);
    assert!(removed.err().contains("exit code 143"), "{}", removed.err());
    ctd.ctr(&["container", "rm", "u1"]).expect_code(0);
    ctd.expect_nothing_left();
    let metrics = ctd.mvm(&["metrics"]).expect_code(0).out();
    assert!(metrics.contains("mvm_machines_ended_total{how="), "{metrics}");
    assert!(!metrics.contains("containerd_id"), "{metrics}");
}

#[test]
fn in_a_pod_it_has_the_pods_address() {
    let Some(ctd) = Containerd::with_cri() else { return };
    import(&ctd);
    let cri = Cri::new(&ctd);
    let pod = cri.run_pod(cri.pod_config("kernel"));
    let config = |name: &str, words: &[&str]| {
        let mut config = cri.container_config(name, "");
        config.image.mut_or_insert_default().image = IMAGE.into();
        config.command = words.iter().map(ToString::to_string).collect();
        config
    };
    // An ordinary container first, as one that prepares something is.
    let first = cri.start(&pod, cri.container_config("first", "echo prepared"));
    assert_eq!(cri.wait(&first), 0);
    let id = cri.start(&pod, config("app", &["hello", "exit=1"]));
    assert_eq!(cri.wait(&id), 3);
    let log = cri.log(&pod, "app");
    let address = cri.address(&pod);
    assert!(log.contains(&format!("ip={address}/24 gateway=10.99.77.1")), "{address}: {log}");
    cri.remove(&id);
    // The pod lives, and it starts again.
    assert!(cri.is_ready(&pod));
    let id = cri.start(&pod, config("again", &["hello", FOREVER]));
    eventually("its output", || cri.log(&pod, "again").contains("Hello"));
    assert_eq!(cri.status(&id).state, RUNNING);
    let refused = cri.try_exec(&id, "true").expect_err("nobody is there");
    assert!(refused.to_string().contains("unikernel"), "{refused}");
    // At the pod's interface there is one machine.
    let refused = cri.try_start(&pod, cri.container_config("beside", "true"));
    let refused = refused.expect_err("no machine for it");
    assert!(refused.to_string().contains("made way"), "{refused}");
    assert_eq!(ctd.mvm(&["ps", "-q"]).expect_code(0).out().lines().count(), 1);
    cri.stop(&id, 30);
    assert_eq!(cri.status(&id).exit_code, 143);
    cri.remove_pod(&pod);
    ctd.expect_nothing_left();
}
