//! Containers by `ctr` in mvm, next to runc, and to gVisor's runsc where that is installed, in one run and in turn.
//!
//! All of them have the same snapshots of the same image; runc's containers are the host's own processes, so that a ratio
//! is what the machine costs. Engine and host are in it: on the emulation engine code takes many times as long.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mvm_net::Namespace;
use mvm_tests::{Cable, Containerd, eventually, run_with};
use serde_json::{Value, json};

use crate::stats::median;

/// Longer than anything that is not stuck takes.
const PATIENCE: Duration = Duration::from_secs(600);

/// Bytes that travel: by files, and by the network.
const MEBIBYTES: usize = 32;

/// What a round measures, in milliseconds each.
const ROWS: [&str; 7] = [
    "create and start, to the first output",
    "the same, to the end",
    "exec of a program that does nothing",
    "500 files made, listed, removed",
    "32 MiB written to the root and synced",
    "32 MiB read from it",
    "32 MiB from the container by TCP",
];

/// A runtime, by its name and by the flags of `ctr run`.
struct Runtime {
    name: &'static str,
    flags: Vec<String>,
    /// It can be given a network namespace that is there already.
    joins: bool,
}

fn found(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

#[allow(clippy::print_stdout)]
fn runtimes() -> Vec<Runtime> {
    let runc = ["--runtime", "io.containerd.runc.v2"].map(String::from).to_vec();
    let mvm = ["--runtime", "io.containerd.mvm.v1"].map(String::from).to_vec();
    let mut all = vec![Runtime { name: "mvm", flags: mvm, joins: true }];
    match found("runsc") {
        Some(path) => {
            let mut flags = runc.clone();
            flags.extend(["--runc-binary".to_owned(), path.display().to_string()]);
            all.push(Runtime { name: "runsc", flags, joins: false });
        }
        None => println!("runsc is not installed: no comparison with it.\n"),
    }
    match found("runc") {
        Some(_) => all.push(Runtime { name: "runc", flags: runc, joins: true }),
        None => println!("runc is not installed: no ratios.\n"),
    }
    all
}

/// Measures `rounds` of everything in turn, prints the table, returns the figures.
#[allow(clippy::print_stdout)]
pub fn measure(rounds: usize) -> Value {
    let Some(ctd) = Containerd::start() else { return Value::Null };
    let runtimes = runtimes();
    let mut times = vec![vec![Vec::new(); ROWS.len()]; runtimes.len()];
    let mut left_out = vec![None; runtimes.len()];
    for round in 0..=rounds {
        for (at, runtime) in runtimes.iter().enumerate() {
            if left_out[at].is_some() {
                continue;
            }
            match measure_one(&ctd, runtime, round) {
                // The first of each warms the page cache.
                Ok(figures) if round > 0 => {
                    times[at].iter_mut().zip(figures).for_each(|(all, ms)| all.push(ms));
                }
                Ok(_) => {}
                Err(why) => {
                    println!("{} is left out: {why}\n", runtime.name);
                    left_out[at] = Some(why);
                }
            }
        }
    }
    let last = runtimes.last().filter(|r| r.name == "runc").map(|_| runtimes.len() - 1);
    let mut head = "| containers by ctr |".to_owned();
    runtimes.iter().for_each(|r| head += &format!(" {}, median ms |", r.name));
    runtimes
        .iter()
        .filter(|r| r.name != "runc")
        .for_each(|r| head += &format!(" {} / runc |", r.name));
    println!("{head}\n|---|{}", "---:|".repeat(head.matches('|').count() - 2));
    let mut rows = serde_json::Map::new();
    for (row, name) in ROWS.iter().enumerate() {
        let middle: Vec<f64> = times.iter().map(|of| median(&of[row])).collect();
        let mut line = format!("| {name} |");
        middle.iter().for_each(|ms| line += &format!(" {ms:.1} |"));
        for (ms, _) in middle.iter().zip(&runtimes).filter(|(_, r)| r.name != "runc") {
            let ratio = last.map_or(f64::NAN, |last| ms / middle[last]);
            line += &format!(" {ratio:.1} |");
        }
        println!("{line}");
        let of = runtimes.iter().zip(&times).map(|(r, t)| (r.name.to_owned(), json!(t[row])));
        rows.insert((*name).to_owned(), Value::Object(of.collect()));
    }
    println!();
    Value::Object(rows)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// One round of a runtime: the figures of [`ROWS`], or why there are none.
fn measure_one(ctd: &Containerd, runtime: &Runtime, round: usize) -> Result<Vec<f64>, String> {
    // runc and runsc know containers of the whole host by it.
    let id = format!("{}-{}-{round}", runtime.name, std::process::id());
    let flags: Vec<&str> = runtime.flags.iter().map(String::as_str).collect();
    let mut figures = Vec::new();

    let mut command = ctd.run_command(&[&["--rm"], &flags[..]].concat(), &id, &["echo", "x"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().map_err(|e| e.to_string())?;
    let mut byte = [0];
    let first = child.stdout.take().map_or(Ok(0), |mut out| out.read(&mut byte));
    let first_ms = ms(start);
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    if !matches!(first, Ok(1)) || !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    figures.extend([first_ms, ms(start)]);

    let cable = Cable::new(&format!("bench-{id}"));
    let namespace = format!("network:{}", cable.path(0).display());
    let log = format!("file://{}", ctd.path("bench.log").display());
    // It serves what it has made once.
    let script = format!(
        "dd if=/dev/zero of=/served bs=1M count={MEBIBYTES} 2>/dev/null; \
         while :; do nc -l -p 5000 </served; done"
    );
    let mut run = [&["-d", "--log-uri", &log], &flags[..]].concat();
    if runtime.joins {
        run.extend(["--with-ns", &namespace]);
    }
    let started = run_with(ctd.run_command(&run, &id, &["sh", "-c", &script]), b"", PATIENCE);
    let clear = || {
        ctd.ctr(&["task", "kill", "-s", "SIGKILL", &id]);
        eventually("the end of the task", || {
            !matches!(ctd.status(&id).as_str(), "RUNNING" | "PAUSED")
        });
        ctd.ctr(&["task", "rm", "--force", &id]);
        ctd.ctr(&["container", "rm", &id]);
    };
    if started.code != 0 {
        clear();
        return Err(started.err().trim().to_owned());
    }
    let exec = |name: &str, script: &str| {
        let start = Instant::now();
        let done = ctd.exec(&id, &format!("{id}-{name}"), script, b"");
        (done.code == 0).then(|| ms(start)).ok_or(format!("exec: {}", done.err().trim()))
    };
    let done = (|| {
        figures.push(exec("nothing", ":")?);
        let files = "mkdir /f && cd /f && n=0; while [ $n -lt 500 ]; do : >f$n; n=$((n + 1)); done; \
                     ls -l | wc -l && cd / && rm -rf /f";
        figures.push(exec("files", files)?);
        let write = format!("dd if=/dev/zero of=/w bs=1M count={MEBIBYTES} 2>/dev/null && sync");
        figures.push(exec("write", &write)?);
        figures.push(exec("read", "dd if=/w of=/dev/null bs=1M 2>/dev/null")?);
        figures.push(if runtime.joins { fetch(&cable)? } else { f64::NAN });
        Ok(figures)
    })();
    clear();
    // What it logged is of no use to the next one.
    let _ = fs::remove_file(ctd.path("bench.log"));
    done
}

/// Milliseconds until all that the container serves has come.
fn fetch(cable: &Cable) -> Result<f64, String> {
    let namespace = Namespace::open(&cable.path(1)).map_err(|e| e.to_string())?;
    let connect = || std::net::TcpStream::connect("10.89.0.2:5000");
    let until = Instant::now() + PATIENCE;
    let (start, mut stream) = loop {
        let start = Instant::now();
        match namespace.enter(connect).map_err(|e| e.to_string())? {
            Ok(stream) => break (start, stream),
            Err(e) if Instant::now() > until => return Err(format!("nobody serves: {e}")),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
    let mut block = vec![0; 1 << 16];
    let mut all = 0;
    while all < MEBIBYTES << 20 {
        match stream.read(&mut block) {
            Ok(0) => return Err(format!("{all} bytes came by TCP")),
            Ok(n) => all += n,
            Err(e) => return Err(format!("after {all} bytes by TCP: {e}")),
        }
    }
    Ok(ms(start))
}
