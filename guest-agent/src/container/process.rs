//! A process as the agent knows it, from its birth to its end.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mvm_agent_protocol::messages::Stdio;
use oci_spec::runtime::{LinuxIdMapping, PosixRlimit, PosixRlimitType};

use crate::cgroup::Cgroup;
use crate::channel::Channel;
use crate::child::{Job, Order, Report};
use crate::error::{Context, Error, Result};
use crate::reaper::{Exit, Reaper};
use crate::spec::{ExecCpuAffinity, Process as Spec};
use crate::streams::Streams;
use crate::sys;
use crate::zygote::{Birth, Zygote};

/// How long setting up or executing may take. A slow disk is in it, a process that hangs is not.
const SETUP: Duration = Duration::from_secs(60);

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    /// In the agent's process-id namespace.
    pub pid: i32,
    /// Its end.
    pub exit: Arc<Exit>,
    /// Its standard streams.
    pub streams: Arc<Streams>,
    pidfd: OwnedFd,
    limits: Vec<PosixRlimit>,
    /// Open until the program is executed.
    sync: Mutex<Option<Channel>>,
    /// How long the hooks may take that come before its program.
    hooks: Duration,
    /// Whether the kernel killed for want of memory while it lived; set at its end.
    oom_killed: Arc<Mutex<bool>>,
}

/// A newly born process that has not been told yet what to become.
#[derive(Debug)]
pub struct Newborn {
    pid: i32,
    pidfd: OwnedFd,
    exit: Arc<Exit>,
    sync: Channel,
    oom_killed: Arc<Mutex<bool>>,
    /// Set when it got streams, so that its end can close the input.
    streams: Arc<Mutex<Option<Arc<Streams>>>>,
}

impl Newborn {
    /// Gives birth to a process in `cgroup`; a further one of a container, `beside` the first.
    pub fn new(
        zygote: &Zygote,
        reaper: &Reaper,
        birth: &Birth<'_>,
        cgroup: &Arc<Cgroup>,
        beside: Option<i32>,
        affinity: Option<&ExecCpuAffinity>,
    ) -> Result<Self> {
        let (ours, theirs) = Channel::pair().context(|| "make a socket pair".into())?;
        ours.set_timeout(SETUP).context(|| "set a timeout".into())?;
        let pid = zygote.spawn(birth, &theirs)?;
        drop(theirs);
        let oom_killed = Arc::new(Mutex::new(false));
        let streams: Arc<Mutex<Option<Arc<Streams>>>> = Arc::default();
        // With the first process of its own process-id namespace the kernel ends the others. Without such a namespace
        // they would live on, and with them the streams that the host waits for the end of.
        let ends_all = beside.is_none() && !birth.new_pid_namespace;
        let exit = {
            let (oom_killed, streams, group) =
                (Arc::clone(&oom_killed), Arc::clone(&streams), Arc::clone(cgroup));
            let kills_before = cgroup.oom_kills();
            reaper.watch(
                pid,
                Box::new(move |_| {
                    *lock(&oom_killed) = group.oom_kills() > kills_before;
                    if ends_all {
                        group.kill_at_once();
                    }
                    if let Some(streams) = &*lock(&streams) {
                        streams.process_ended();
                    }
                }),
            )
        };
        let pidfd = sys::pidfd_open(pid).context(|| format!("open process {pid}"))?;
        let newborn = Self { pid, pidfd, exit, sync: ours, oom_killed, streams };
        let move_to = |cpus: Option<&String>| cpus.map_or(Ok(()), |cpus| run_on(pid, cpus));
        move_to(affinity.and_then(|a| a.initial.as_ref()))?;
        cgroup.add(pid, beside)?;
        move_to(affinity.and_then(|a| a.last.as_ref()))?;
        Ok(newborn)
    }

    /// Writes the id maps of its user namespace and returns a descriptor of that.
    pub fn map_ids(&self, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<OwnedFd> {
        let pid = self.pid;
        for (file, field, map) in
            [("uid_map", "uidMappings", uids), ("gid_map", "gidMappings", gids)]
        {
            let lines: String = map
                .iter()
                .map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size()))
                .collect();
            fs::write(format!("/proc/{pid}/{file}"), lines).context(|| format!("linux.{field}"))?;
        }
        fs::File::open(format!("/proc/{pid}/ns/user"))
            .map(OwnedFd::from)
            .context(|| "open the user namespace".into())
    }

    /// Sets how readily the kernel kills it for want of memory.
    pub fn set_oom_score(&self, score: i32) -> Result<()> {
        fs::write(format!("/proc/{}/oom_score_adj", self.pid), score.to_string())
            .context(|| format!("process.oomScoreAdj {score}"))
    }

    /// Has it become what `job` says, up to the execution of its program.
    pub fn set_up(
        self,
        job: Job,
        spec_json: &[u8],
        spec: &Spec,
        stdio: &Stdio,
        join: Option<BorrowedFd<'_>>,
    ) -> Result<(Process, Vec<String>)> {
        let terminal = spec.terminal.unwrap_or(false);
        if terminal != stdio.terminal {
            return Err(Error::Invalid(format!(
                "process.terminal is {terminal}, the streams asked for say {}",
                stdio.terminal
            )));
        }
        let limits = limits(spec)?;
        let mut streams = Streams::default();
        let mut ends = None;
        if !terminal {
            let (ours, theirs) = Streams::pipes(stdio.stdin, stdio.stdout, stdio.stderr)
                .context(|| "make pipes".into())?;
            (streams, ends) = (ours, Some(theirs));
        }
        let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
        if let Some(ends) = &ends {
            fds.extend([ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()]);
        }
        fds.extend(join);
        self.sync
            .send(&Order::Become(job), &fds)
            .and_then(|()| self.sync.send_bytes(spec_json))
            .map_err(|e| self.broken("set-up", &e))?;
        drop(ends);

        let (report, mut received) = match self.sync.receive() {
            Ok(Some(received)) => received,
            Ok(None) => return Err(self.vanished()),
            Err(e) => return Err(self.broken("set-up", &e)),
        };
        let notices = match report {
            Report::Ready { notices } => notices,
            Report::Failed(error) => return Err(error),
        };
        if terminal {
            let master = received
                .pop()
                .ok_or_else(|| Error::State("the process has set up no terminal".into()))?;
            streams = Streams::of_terminal(master);
        }
        let streams = Arc::new(streams);
        *lock(&self.streams) = Some(Arc::clone(&streams));
        let process = Process {
            pid: self.pid,
            exit: self.exit,
            streams,
            pidfd: self.pidfd,
            limits,
            sync: Mutex::new(Some(self.sync)),
            hooks: Duration::ZERO,
            oom_killed: self.oom_killed,
        };
        Ok((process, notices))
    }

    /// Ends a process that did not become what it should have.
    pub fn abandon(pidfd: BorrowedFd<'_>, exit: &Exit) {
        // It may have ended by itself.
        let _ = sys::pidfd_signal(pidfd, libc::SIGKILL);
        exit.wait(Duration::from_secs(5));
    }

    /// A handle to abandon it by after [`Newborn::set_up`] has consumed it.
    pub fn handle(&self) -> Result<(OwnedFd, Arc<Exit>)> {
        let fd = self.pidfd.try_clone().context(|| "duplicate a descriptor".into())?;
        Ok((fd, Arc::clone(&self.exit)))
    }

    fn broken(&self, phase: &str, error: &std::io::Error) -> Error {
        match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                Error::State(format!("process {}: no answer in {phase} within {SETUP:?}", self.pid))
            }
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => self.vanished(),
            _ => Error::State(format!("process {}: {phase}: {error}", self.pid)),
        }
    }

    fn vanished(&self) -> Error {
        let how = match self.exit.wait(Duration::from_secs(1)) {
            Some(ended) if ended.signal != 0 => format!("killed by signal {}", ended.signal),
            Some(ended) => format!("exit code {}", ended.code),
            None => "its channel was closed".into(),
        };
        let oom = if *lock(&self.oom_killed) { ", out of memory" } else { "" };
        Error::State(format!("the process ended while it was set up ({how}{oom})"))
    }
}

impl Process {
    /// The same process, before whose program there are hooks that may take so long.
    pub fn with_hooks(self, hooks: Duration) -> Self {
        Self { hooks, ..self }
    }

    /// Executes the program.
    pub fn start(&self) -> Result<()> {
        let Some(sync) = lock(&self.sync).take() else {
            return Err(Error::State("the process has been started already".into()));
        };
        if self.exit.get().is_some() {
            return Err(Error::State("the process has ended before it was started".into()));
        }
        for limit in &self.limits {
            let name = limit.typ();
            sys::set_limit(self.pid, resource(name), limit.soft(), limit.hard())
                .context(|| format!("process.rlimits: {name}={}:{}", limit.soft(), limit.hard()))?;
        }
        let gone = |e| Error::State(format!("the process cannot be started: {e}"));
        sync.set_timeout(SETUP.saturating_add(self.hooks)).map_err(gone)?;
        sync.send(&Order::Start, &[]).map_err(gone)?;
        match sync.receive::<Report>() {
            // Closed by a successful exec.
            Ok(None) => Ok(()),
            Ok(Some((Report::Failed(error), _))) => Err(error),
            Ok(Some((Report::Ready { .. }, _))) => {
                Err(Error::State("the process reports ready twice".into()))
            }
            // Killed between the order and exec: its end tells.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            Err(e) => Err(gone(e)),
        }
    }

    /// Whether its program has been executed.
    pub fn is_started(&self) -> bool {
        lock(&self.sync).is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        match sys::pidfd_signal(self.pidfd.as_fd(), signal) {
            Ok(()) => Ok(()),
            Err(nix::errno::Errno::ESRCH) => Err(Error::NotFound("the process has ended".into())),
            Err(e) => Err(Error::system(format!("send signal {signal}"), e)),
        }
    }

    /// Kills it and waits for its end.
    pub fn kill(&self) {
        Newborn::abandon(self.pidfd.as_fd(), &self.exit);
    }

    /// Whether it ended while the kernel killed for want of memory.
    pub fn was_oom_killed(&self) -> bool {
        *lock(&self.oom_killed)
    }

    /// The descriptor that names it.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Refuses what cannot be, before anything is born.
pub fn check(spec: &Spec) -> Result<()> {
    if !spec.cwd.is_absolute() {
        return Err(Error::Invalid(format!(
            "process.cwd: {:?} is not an absolute path",
            spec.cwd.display()
        )));
    }
    for cpus in spec.exec_cpu_affinity.iter().flat_map(|a| [&a.initial, &a.last]).flatten() {
        parse_cpus(cpus)?;
    }
    limits(spec).map(drop)
}

/// Has a process run on the CPUs of a list such as `0-3,7` only.
fn run_on(pid: i32, cpus: &str) -> Result<()> {
    let list = parse_cpus(cpus)?;
    if list.is_empty() {
        return Ok(());
    }
    sys::set_affinity(pid, &list).context(|| format!("process.execCPUAffinity {cpus:?}"))
}

fn parse_cpus(text: &str) -> Result<Vec<usize>> {
    let number = |text: &str| text.parse::<usize>().ok().filter(|cpu| *cpu < sys::MAX_CPUS);
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => Some(number(first)?..=number(last)?),
        None => number(part).map(|cpu| cpu..=cpu),
    };
    let mut cpus = Vec::new();
    for part in text.split(',').filter(|_| !text.is_empty()) {
        cpus.extend(range(part).filter(|r| !r.is_empty()).ok_or_else(|| {
            Error::Invalid(format!("process.execCPUAffinity: {text:?} is no list of CPUs"))
        })?);
    }
    Ok(cpus)
}

/// The limits, checked: what the kernel would refuse at the start is refused here already.
fn limits(spec: &Spec) -> Result<Vec<PosixRlimit>> {
    let limits = spec.rlimits.clone().unwrap_or_default();
    for (at, limit) in limits.iter().enumerate() {
        let name = limit.typ();
        if limit.soft() > limit.hard() {
            return Err(Error::Invalid(format!(
                "process.rlimits: {name}: soft limit {} exceeds hard limit {}",
                limit.soft(),
                limit.hard()
            )));
        }
        if limits[..at].iter().any(|earlier| earlier.typ() == name) {
            return Err(Error::Invalid(format!("process.rlimits: {name} is there twice")));
        }
    }
    Ok(limits)
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpus("0-2,7").unwrap(), [0, 1, 2, 7]);
        assert!(parse_cpus("").unwrap().is_empty());
        for bad in ["a", "1-", "2-1", "0,,1", "-1", "0-99999999999", "1024"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn relative_working_directories_are_refused() {
        let check = |cwd: &str| check(&Spec { cwd: cwd.into(), ..Spec::default() });
        assert!(check("/").is_ok());
        for bad in ["", "srv", "./x"] {
            assert!(matches!(check(bad), Err(Error::Invalid(m)) if m.contains("process.cwd")));
        }
    }

    #[test]
    fn contradictory_limits_are_refused_before_anything_is_born() {
        let check = |rlimits: &str| {
            let json = format!(r#"{{"cwd":"/","user":{{}},"rlimits":[{rlimits}]}}"#);
            limits(&serde_json::from_str::<Spec>(&json).unwrap()).map(drop)
        };
        let one = r#"{"type":"RLIMIT_NOFILE","soft":1,"hard":2}"#;
        assert!(check(one).is_ok());
        assert!(check(&format!("{one},{one}")).is_err());
        assert!(check(r#"{"type":"RLIMIT_CORE","soft":2,"hard":1}"#).is_err());
    }
}
