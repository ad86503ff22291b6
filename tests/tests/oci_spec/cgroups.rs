//! `linux.resources`, in files of control groups version 2.

use mvm_agent_protocol::messages::UpdateResourcesRequest;
use serde_json::{Value, json};

use crate::machine::{Case, sh};

fn resources(resources: Value) -> Value {
    json!({"linux": {"resources": resources}})
}

/// The contents of files of the container's group.
fn files(names: &str, change: Value) -> String {
    sh(&format!("cd /sys/fs/cgroup && cat {names}")).with(resources(change)).out()
}

/// The image's disk in the guest, as the kernel numbers it.
fn disk() -> (u64, u64) {
    let out = sh("cat /sys/block/vda/dev").out();
    let (major, minor) = out.trim().split_once(':').unwrap();
    (major.parse().unwrap(), minor.parse().unwrap())
}

#[test]
fn memory_limit_swap_and_reservation() {
    let memory =
        json!({"memory": {"limit": 67_108_864, "swap": 134_217_728, "reservation": 1_048_576}});
    let out = files("memory.max memory.swap.max memory.low", memory);
    assert_eq!(out, "67108864\n67108864\n1048576\n", "swap is memory and swap together");
    let unlimited = json!({"memory": {"limit": -1, "swap": -1}});
    assert_eq!(files("memory.max memory.swap.max", unlimited), "max\nmax\n");
    let refused = |memory: Value| sh("true").with(resources(json!({"memory": memory}))).refused();
    assert!(refused(json!({"limit": 1000, "swap": 10})).contains("linux.resources.memory.swap"));
    assert!(refused(json!({"limit": 1_u64 << 63})).contains("9223372036854775808"));
    let tiny = refused(json!({"limit": 4096}));
    assert!(tiny.contains("out of memory") || tiny.contains("memory"), "{tiny}");
}

#[test]
fn memory_fields_of_version_1_are_a_notice() {
    let memory = json!({"memory": {"kernel": 1, "kernelTCP": 1, "swappiness": 1,
        "disableOOMKiller": true, "useHierarchy": true}});
    let outcome = sh("true").with(resources(memory)).run();
    assert_eq!(outcome.code, 0);
    for field in ["kernel:", "kernelTCP", "swappiness", "disableOOMKiller"] {
        let wanted = format!("linux.resources.memory.{field}");
        assert!(outcome.notices.iter().any(|n| n.starts_with(&wanted)), "{:?}", outcome.notices);
    }
    assert_eq!(outcome.notices.len(), 4, "useHierarchy always holds: {:?}", outcome.notices);
}

#[test]
fn out_of_memory_is_reported_as_such() {
    let limit = resources(json!({"memory": {"limit": 20 << 20, "swap": 20 << 20}}));
    let eat = sh("x=a; while :; do x=$x$x; done").with(limit.clone()).run();
    assert_eq!((eat.signal, eat.oom), (9, true), "{eat:?}");
    let child =
        sh("(x=a; while :; do x=$x$x; done) 2>/dev/null; echo code $?; exit 3").with(limit).run();
    assert_eq!(
        (child.code, child.oom, child.out.as_str()),
        (3, true, "code 137\n"),
        "a child's end"
    );
    assert!(!sh("kill -9 $$; exit 0").run().oom);
}

#[test]
fn cpu_shares_quota_burst_and_idle() {
    let cpu = json!({"cpu": {"shares": 1024, "quota": 50_000, "period": 200_000, "burst": 10_000}});
    assert_eq!(files("cpu.weight cpu.max cpu.max.burst", cpu), "39\n50000 200000\n10000\n");
    assert_eq!(files("cpu.idle", json!({"cpu": {"idle": 1}})), "1\n");
    assert_eq!(files("cpu.max", json!({"cpu": {"quota": -1}})), "max 100000\n");
    let refused = |cpu: Value| sh("true").with(resources(json!({"cpu": cpu}))).refused();
    let low = refused(json!({"quota": 1}));
    assert!(low.contains("linux.resources.cpu.quota") && low.contains("cpu.max"), "{low}");
    let realtime =
        sh("true").with(resources(json!({"cpu": {"realtimeRuntime": 5, "realtimePeriod": 6}})));
    assert!(realtime.run().notices[0].contains("realtimeRuntime"));
}

#[test]
fn cpu_sets() {
    let out = sh("cat /sys/fs/cgroup/cpuset.cpus /sys/fs/cgroup/cpuset.mems; grep Cpus_allowed_list /proc/self/status; nproc")
        .with(resources(json!({"cpu": {"cpus": "1", "mems": "0"}})))
        .out();
    assert_eq!(out, "1\n0\nCpus_allowed_list:\t1\n1\n");
    let refused = sh("true").with(resources(json!({"cpu": {"cpus": "77"}}))).refused();
    assert!(refused.contains("linux.resources.cpu.cpus") && refused.contains("77"), "{refused}");
}

#[test]
fn pids_limit() {
    assert_eq!(files("pids.max", json!({"pids": {"limit": 17}})), "17\n");
    assert_eq!(files("pids.max", json!({"pids": {"limit": -1}})), "max\n");
    let script = "for i in 1 2 3 4 5 6 7 8; do sleep 100 & done; true";
    let outcome = sh(script).with(resources(json!({"pids": {"limit": 4}}))).run();
    assert!(outcome.err.contains("fork"), "{outcome:?}");
}

#[test]
fn block_io_throttling() {
    let (major, minor) = disk();
    let device = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let out = files(
        "io.max",
        json!({"blockIO": {
        "throttleReadBpsDevice": device(1_000_000), "throttleWriteBpsDevice": device(2_000_000),
        "throttleReadIOPSDevice": device(300), "throttleWriteIOPSDevice": device(400)}}),
    );
    assert_eq!(out, format!("{major}:{minor} rbps=1000000 wbps=2000000 riops=300 wiops=400\n"));
    let missing =
        json!({"blockIO": {"throttleReadBpsDevice": [{"major": 99, "minor": 99, "rate": 1}]}});
    let refused = sh("true").with(resources(missing)).refused();
    assert!(refused.contains("linux.resources.blockIO") && refused.contains("99:99"), "{refused}");
}

#[test]
fn block_io_weights_are_a_notice() {
    let (major, minor) = disk();
    let io = json!({"blockIO": {"weight": 100, "leafWeight": 10,
        "weightDevice": [{"major": major, "minor": minor, "weight": 300}]}});
    let outcome = sh("true").with(resources(io)).run();
    assert_eq!(outcome.code, 0);
    for field in ["blockIO.weight:", "blockIO.weightDevice", "blockIO.leafWeight"] {
        let wanted = format!("linux.resources.{field}");
        assert!(outcome.notices.iter().any(|n| n.starts_with(&wanted)), "{:?}", outcome.notices);
    }
}

#[test]
fn hugepage_limits() {
    let huge = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}]});
    assert_eq!(files("hugetlb.2MB.max", huge), "4194304\n");
    let strange = json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]});
    let outcome = sh("true").with(resources(strange)).run();
    assert!(matches!(&outcome.notices[..], [n] if n.contains("hugetlb.3MB.max")), "{outcome:?}");
    let evil = json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]});
    assert!(sh("true").with(resources(evil)).refused().contains("hugepageLimits"));
}

#[test]
fn network_and_rdma_are_a_notice() {
    let change = json!({"network": {"classID": 1}, "rdma": {"mlx": {"hcaHandles": 1}}});
    let notices = sh("true").with(resources(change)).run().notices;
    for field in ["linux.resources.network", "linux.resources.rdma"] {
        assert!(notices.iter().any(|n| n.starts_with(field)), "{notices:?}");
    }
}

#[test]
fn unified_files() {
    let unified = json!({"unified": {"memory.high": "33554432", "pids.max": "99"}});
    assert_eq!(files("memory.high pids.max", unified), "33554432\n99\n");
    for (key, value) in [("../cgroup.procs", "1"), ("no.such", "1"), ("memory.high", "lots")] {
        let refused = sh("true").with(resources(json!({"unified": {key: value}}))).refused();
        assert!(refused.contains("linux.resources.unified") && refused.contains(key), "{refused}");
        assert!(!refused.contains("Permission"), "{refused}");
    }
}

#[test]
fn device_rules() {
    let (major, minor) = disk();
    let node = json!([{"path": "/dev/disk", "type": "b", "major": major, "minor": minor}]);
    let read = |rules: Value| -> Case {
        sh("head -c 1 /dev/disk | wc -c; head -c 1 /dev/zero | wc -c; mknod /dev/other b 7 7 && echo made")
            .with(json!({"linux": {"devices": node, "resources": {"devices": rules}}}))
    };
    let deny = json!({"allow": false, "access": "rwm"});
    let denied = read(json!([deny])).run();
    assert_eq!(denied.out, "0\n1\nmade\n", "default devices and mknod always: {denied:?}");
    assert!(denied.err.contains("Operation not permitted"), "{}", denied.err);
    let allow = json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "r"});
    assert_eq!(read(json!([deny, allow])).run().out, "1\n1\nmade\n", "the later rule decides");
    assert_eq!(read(json!([allow, deny])).run().out, "0\n1\nmade\n");
    for rule in [
        json!({"allow": true, "type": "b", "access": "x"}),
        json!({"allow": true, "type": "p"}),
        json!({"allow": true, "type": "c", "major": -5}),
    ] {
        let refused = read(json!([rule])).refused();
        assert!(refused.contains("linux.resources.devices"), "{refused}");
    }
}

#[test]
fn limits_can_be_changed_later() {
    let mut running = sh("echo ready; read x; cat /sys/fs/cgroup/memory.max").start().unwrap();
    running.until("ready");
    let update = |json: Value| {
        let request = UpdateResourcesRequest {
            container_id: running.id().into(),
            resources_json: json.to_string().into_bytes(),
            ..Default::default()
        };
        running.call(|client, limit| client.update_resources(&request, limit))
    };
    let low = update(json!({"memory": {"limit": 1, "checkBeforeUpdate": true}})).unwrap_err();
    assert!(low.contains("checkBeforeUpdate"), "{low}");
    update(json!({"memory": {"limit": 50_000_000, "checkBeforeUpdate": true}})).unwrap();
    running.write("go on\n");
    assert_eq!(running.finish().out, "49999872\n", "whole pages");
}

#[test]
fn the_group_is_the_containers_own() {
    let out = sh("cat /proc/self/cgroup; mkdir /sys/fs/cgroup/x").run();
    assert_eq!(out.out, "0::/\n");
    assert!(out.err.contains("Read-only"), "{}", out.err);
    let outer = sh("cat /proc/self/cgroup").without_namespace("cgroup").out();
    assert!(outer.starts_with("0::/mvm/case"), "{outer}");
}
