//! Containers that are unikernels: machines of their own, with neither our Linux nor an agent in them.
//!
//! The start is the load of the kernel, what it writes to its serial port is the output, and the end of
//! the machine is the end of the task. What takes processes in the guest is refused by name.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mvm_agent_protocol::messages::StatsResponse;
use mvm_sandbox::ending::Ending;
use mvm_sandbox::guest::{Stdio, Streams};
use mvm_sandbox::machine::{MonitorLauncher, Payload};
use mvm_sandbox::ops;
use mvm_sandbox::pump::Flag;
use mvm_sandbox::registry::Registry;
use mvm_sandbox::timings::Timings;
use mvm_sandbox::unikernel::{self, DirTree, Files, Packaging, Pairs, Recognised, UnikernelPlan};
use mvm_sandbox::{BarePlan, Disk, Sandbox, Woken};
use mvm_vmm::EndReason;
use oci_spec::runtime::Spec;

use super::cgroup::Cgroups;
use super::spec;
use crate::error::{Error, Result};
use crate::host::Bare;

const SIGKILL: i32 = 9;

/// Signals that end what does nothing about them, and that people send for that: SIGHUP, SIGINT, SIGQUIT,
/// SIGABRT, SIGKILL, SIGALRM, SIGTERM.
const FATAL: [i32; 7] = [1, 2, 3, 6, SIGKILL, 14, 15];

/// Says whether a container is a unikernel, and how it is booted. `root` is where its root is mounted.
///
/// # Errors
/// It calls itself one in a way that makes no sense.
pub fn recognise(spec: &Spec, root: &Path) -> Result<Option<UnikernelPlan>> {
    let process = spec.process().as_ref();
    let env = process.and_then(|p| p.env().clone()).unwrap_or_default();
    let args = process.and_then(|p| p.args().clone()).unwrap_or_default();
    let none = Pairs::new();
    let packaging = Packaging {
        annotations: &spec::annotations(spec).into_iter().collect(),
        manifest: &none,
        layers: &[],
        labels: &none,
        env: &env,
        entrypoint: &[],
        cmd: &[],
        args: &args,
        kernel_args: "",
        disks: &[],
        unikernel_platform: false,
        tree: &DirTree::open(root).map_err(bad)?,
    };
    match unikernel::recognise(&packaging).map_err(bad)? {
        Recognised::Unikernel(plan) => Ok(Some(plan)),
        Recognised::Linux(_) => Ok(None),
    }
}

fn bad(error: unikernel::Error) -> Error {
    Error::InvalidArgument(error.to_string())
}

/// Whether the specification itself says so, before anything of the root is looked at.
pub fn is_annotated(spec: &Spec) -> bool {
    unikernel::is_annotated(&spec::annotations(spec).into_iter().collect())
}

/// Loads the kernel, and starts the machine in a sandbox that is connected already.
///
/// # Errors
/// A file of the image cannot be used, or the machine cannot be started.
pub fn boot(
    sandbox: &mut Sandbox,
    plan: &UnikernelPlan,
    root: &Path,
    hardware: Bare,
    stdio: Stdio,
    interrupt: &Flag,
) -> Result<Streams> {
    let Files { kernel, initrd, disk } =
        Files::extract(plan, &DirTree::open(root).map_err(bad)?, &sandbox.place().logs)
            .map_err(bad)?;
    let mut dialect = plan.dialect.clone();
    dialect.look_into(&kernel).map_err(Error::failed_to("cannot read the kernel"))?;
    let mut left_out = plan.left_out.clone();
    let mut cmdline = plan.cmdline.clone();
    if let Some(addresses) = sandbox.addresses() {
        let told = addresses.tell(&dialect, &cmdline);
        cmdline = told.cmdline;
        left_out.extend(told.left_out);
    }
    left_out.iter().for_each(|what| tracing::warn!(sandbox = sandbox.id(), "{what}"));
    let kind = plan.kind();
    let bare = BarePlan {
        vcpus: hardware.vcpus,
        memory: hardware.memory,
        hugepages: hardware.hugepages,
        engine: hardware.engine,
        cpu: hardware.cpu,
        kernel: Payload::file(kernel),
        initrd: initrd.map(Payload::file),
        modules: Vec::new(),
        cmdline,
        style: kind.style(plan.boot),
        exit_status: kind.tells_exit_status(),
        boot: plan.boot,
        disks: disk.into_iter().map(|file| Disk { file, read_only: false }).collect(),
        input: stdio.stdin && kind.takes_input(),
        vsock: None,
    };
    let words = plan.words.clone();
    let timings = &mut Timings::start();
    let line = sandbox.start_bare(&MonitorLauncher, bare, words, timings, interrupt.as_fd())?;
    Ok(Streams { input: line.input, output: Some(line.output), error: None })
}

/// A unikernel that runs, or has run.
#[derive(Debug)]
pub struct Unikernel {
    /// The sandbox's id.
    id: String,
    registry: Registry,
    /// The machine's memory, in bytes.
    memory: u64,
    stop: Flag,
    phase: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Debug)]
struct Phase {
    /// Until somebody waits for its end.
    booted: Option<(Box<Sandbox>, Cgroups)>,
    /// What it is to end with.
    signal: Option<i32>,
    /// Nothing of it is left.
    ended: bool,
}

impl Unikernel {
    /// What [`boot`] has started, with its processes in `groups`.
    ///
    /// # Errors
    /// Descriptors are short.
    pub fn new(registry: &Registry, sandbox: Sandbox, groups: Cgroups) -> Result<Arc<Self>> {
        let (id, memory) = (sandbox.id().to_owned(), sandbox.state().memory);
        let booted = Some((Box::new(sandbox), groups));
        Ok(Arc::new(Self {
            id,
            registry: registry.clone(),
            memory,
            stop: Flag::new().map_err(Error::failed)?,
            phase: Mutex::new(Phase { booted, signal: None, ended: false }),
            changed: Condvar::new(),
        }))
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its machine has ended.
    pub fn is_over(&self) -> bool {
        self.phase().ended
    }

    /// Waits for its end and takes its machine down. Returns the exit code. To be called once.
    ///
    /// # Errors
    /// Somebody waits for it already.
    pub fn wait(&self) -> Result<u32> {
        let Some((sandbox, groups)) = self.phase().booted.take() else {
            return Err(Error::FailedPrecondition("somebody waits for its end already".into()));
        };
        Ok(self.lead(*sandbox, groups))
    }

    fn lead(&self, mut sandbox: Sandbox, groups: Cgroups) -> u32 {
        let woken = sandbox.wait_machine(&mut Timings::start(), &[self.stop.as_fd()]);
        let (exit_code, reason) = match woken {
            Ok(Woken::Ended(outcome)) => {
                let reason = outcome.reason;
                let said_so = reason.is_orderly() && reason != EndReason::Stopped;
                if !said_so {
                    tracing::error!(sandbox = self.id, "{reason}");
                }
                (i32::from(reason.exit_code()), (!said_so).then(|| reason.to_string()))
            }
            Ok(Woken::Other(_)) => {
                let signal = self.phase().signal.unwrap_or(SIGKILL);
                (128 + signal, Some(format!("ended by signal {signal}")))
            }
            Err(e) => (255, Some(e.to_string())),
        };
        let finished = sandbox.finish(&Ending { exit_code, oom_killed: false, reason });
        drop(groups);
        self.phase().ended = true;
        self.changed.notify_all();
        if let Err(e) = finished {
            tracing::warn!(sandbox = self.id, "cannot clean up: {e}");
        }
        u32::try_from(exit_code).unwrap_or(255)
    }

    /// What would end a process ends the machine.
    ///
    /// # Errors
    /// [`Error::Unimplemented`] for other signals.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if !FATAL.contains(&signal) {
            return Err(refused(&format!("delivering signal {signal}, which ends nothing,")));
        }
        let mut phase = self.phase();
        if phase.ended {
            return Err(Error::NotFound("process already finished".into()));
        }
        phase.signal.get_or_insert(signal);
        self.stop.raise();
        Ok(())
    }

    /// Ends it if it runs; nothing of it is left then.
    pub fn end(&self) {
        let mut phase = self.phase();
        phase.signal.get_or_insert(SIGKILL);
        self.stop.raise();
        if let Some((sandbox, groups)) = phase.booted.take() {
            drop(phase);
            self.lead(*sandbox, groups);
            return;
        }
        // Whoever waits for its end has been told.
        while !phase.ended {
            phase = self.changed.wait(phase).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stops its processors.
    ///
    /// # Errors
    /// It does not run, or the monitor refuses.
    pub fn pause(&self) -> Result<()> {
        Ok(ops::find(&self.registry, &self.id)?.pause()?)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// They are not stopped, or the monitor refuses.
    pub fn resume(&self) -> Result<()> {
        Ok(ops::find(&self.registry, &self.id)?.resume()?)
    }

    /// What its machine takes of the host: all that can be known.
    ///
    /// # Errors
    /// It does not run.
    pub fn stats(&self) -> Result<StatsResponse> {
        let machine = ops::find(&self.registry, &self.id)?.control()?.stats();
        let machine = machine.map_err(mvm_sandbox::Error::from)?;
        let usage = u64::try_from(machine.cpu_time.as_micros()).unwrap_or(u64::MAX);
        Ok(StatsResponse {
            cpu: [("usage_usec".to_owned(), usage)].into(),
            memory_current: machine.guest_resident,
            memory_peak: machine.guest_resident,
            memory_max: self.memory,
            pids_current: 1,
            pids_max: u64::MAX,
            ..StatsResponse::default()
        })
    }
}

/// What takes somebody in the guest.
pub fn refused(what: &str) -> Error {
    Error::Unimplemented(format!(
        "{what} takes somebody in the guest to do it, and in a unikernel there is nobody: it is one program"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(annotations: &[(&str, &str)], args: &[&str]) -> Spec {
        let annotations: serde_json::Map<_, _> =
            annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "annotations": annotations,
            "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": args, "env": ["A=b"] },
        }))
        .unwrap()
    }

    const TYPE: (&str, &str) = ("com.urunc.unikernel.unikernelType", "rust");

    #[test]
    fn images_are_recognised_by_annotations_and_by_their_files() {
        let root = tempfile::tempdir().unwrap();
        let plain = spec(&[], &["sh"]);
        assert_eq!(recognise(&plain, root.path()).unwrap(), None);
        assert!(!is_annotated(&plain));
        let annotated = spec(&[TYPE, ("com.urunc.unikernel.binary", "/k.elf")], &["a", "b"]);
        assert!(is_annotated(&annotated));
        let plan = recognise(&annotated, root.path()).unwrap().unwrap();
        assert_eq!((plan.kernel.as_str(), plan.cmdline.as_str()), ("/k.elf", "a b"));
        let file = serde_json::json!({ TYPE.0: TYPE.1, "com.urunc.unikernel.binary": "/k2" });
        std::fs::write(root.path().join("urunc.json"), file.to_string()).unwrap();
        assert_eq!(recognise(&plain, root.path()).unwrap().unwrap().kernel, "/k2");
        let broken = spec(&[TYPE], &[]);
        let error = recognise(&broken, root.path()).unwrap_err().to_string();
        assert!(error.contains("com.urunc.unikernel.binary"), "{error}");
    }
}
