//! From `mvm run` to the container's process and back, phase by phase, and the CPU time until the
//! agent is ready next to QEMU's for the same kernel and initramfs.

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;

use mvm_tests::World;
use serde_json::{Value, json};

use crate::ebench::MEBIBYTES;
use crate::qemu::{Machine, Qemu};
use crate::stats::median;

/// CPU time until the agent is ready, in milliseconds, and all figures.
#[derive(Debug)]
pub struct Boot {
    pub mvm_ms: f64,
    pub tcg_ms: Option<f64>,
    pub figures: Value,
}

/// Measures `runs` starts, prints the tables, returns the figures.
#[allow(clippy::print_stdout)]
pub fn measure(world: &World, qemu: Option<&Qemu>, runs: usize) -> Boot {
    let image = world.image_file("busybox");
    world.mvm(&["image", "import", &image.display().to_string()]).expect_code(0);
    let mut order = Vec::new();
    let mut wall: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut cpu: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..=runs {
        let run = world
            .mvm(&["run", "--rm", "--timings=json", "--memory", "512m", "busybox", "true"])
            .expect_code(0);
        for span in spans(&run.err()) {
            let Some(phase) = span["phase"].as_str() else { continue };
            if !order.iter().any(|p| p == phase) {
                order.push(phase.to_owned());
            }
            wall.entry(phase.into()).or_default().extend(span["ms"].as_f64());
            cpu.entry(phase.into()).or_default().extend(span["monitor_cpu_ms"].as_f64());
        }
    }
    println!("| phase | ms | monitor's CPU so far, ms |\n|---|---:|---:|");
    for phase in &order {
        // The first run warms the page cache.
        let later = |all: &BTreeMap<String, Vec<f64>>| {
            all.get(phase).map_or(f64::NAN, |v| median(v.get(1..).unwrap_or(&[])))
        };
        let cpu = later(&cpu);
        let cpu = if cpu.is_nan() { "-".to_owned() } else { format!("{cpu:.0}") };
        println!("| {phase} | {:.1} | {cpu} |", later(&wall));
    }
    println!();
    let ready = cpu.get("agent ready").map_or(f64::NAN, |v| median(v));
    let tcg = qemu.map(|q| {
        let initramfs = PathBuf::from(env::var_os("MVM_TEST_IMAGES").unwrap_or_default())
            .join("initramfs.cpio");
        // Without vsock the agent gives up at once, and the guest reboots: the run ends where it is ready.
        let words = String::new();
        let machine =
            Machine { initramfs: &initramfs, words, vcpus: 1, mebibytes: MEBIBYTES, disk: None };
        let seconds: Vec<f64> = (0..runs).map(|_| q.boot(&machine).1).collect();
        median(&seconds) * 1e3
    });
    if let Some(tcg) = tcg {
        println!(
            "CPU time to agent ready: mvm emu {ready:.0} ms, QEMU TCG {tcg:.0} ms, ratio {:.2}\n",
            ready / tcg
        );
    }
    let figures = json!({ "wall_ms": wall, "monitor_cpu_ms": cpu, "qemu_cpu_ms": tcg });
    Boot { mvm_ms: ready, tcg_ms: tcg, figures }
}

/// The spans in the JSON that `--timings=json` leaves on standard error.
fn spans(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .flat_map(|v| match v {
            Value::Array(spans) => spans,
            Value::Object(mut map) => match map.remove("phases") {
                Some(Value::Array(spans)) => spans,
                _ => vec![Value::Object(map)],
            },
            _ => Vec::new(),
        })
        .collect()
}
