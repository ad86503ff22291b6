//! `mvm install`: the file itself, the shim's name beside it, and containerd's configuration.

mod containerd;

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tempfile::NamedTempFile;

use crate::cli::InstallArgs;
use crate::output::{complain, line};

/// This program, however it was started.
const SELF: &str = "/proc/self/exe";

/// The name by which containerd finds the shim of `io.containerd.mvm.v1`.
const SHIM: &str = "containerd-shim-mvm-v1";

/// How long containerd may take to read its configuration.
const CHECK: Duration = Duration::from_secs(20);

pub fn install(args: &InstallArgs) -> anyhow::Result<()> {
    let bin = below(args, &args.prefix).join("bin");
    let config = below(args, &args.containerd_config);
    if args.undo {
        // In the opposite order: what is configured is there.
        if args.containerd {
            configure(&config, args, containerd::remove)?;
        }
        remove_link(&bin)?;
        return remove(&bin.join("mvm"));
    }
    fs::create_dir_all(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
    copy(&bin.join("mvm"))?;
    link(&bin)?;
    if args.containerd {
        configure(&config, args, containerd::add)?;
    }
    Ok(())
}

/// `path` on the host.
fn below(args: &InstallArgs, path: &Path) -> PathBuf {
    match &args.destdir {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    }
}

/// Puts this program at `to`. Programs that run from a file there go on with it.
fn copy(to: &Path) -> anyhow::Result<()> {
    let ours = fs::canonicalize(SELF).context("cannot find this program")?;
    if fs::canonicalize(to).is_ok_and(|there| there == ours) || is_same(&ours, to) {
        return line(&format!("{} is there", to.display()));
    }
    let failed = || format!("cannot write {}", to.display());
    let mut file = new_beside(to)?;
    let mut source = fs::File::open(SELF).with_context(failed)?;
    io::copy(&mut source, &mut file).with_context(failed)?;
    replace(file, to, 0o755)?;
    line(&format!("{} installed", to.display()))
}

/// Whether two files have the same contents.
fn is_same(a: &Path, b: &Path) -> bool {
    let size = |path| fs::metadata(path).map(|about| about.len());
    let sizes = (size(a), size(b));
    if !matches!(sizes, (Ok(first), Ok(second)) if first == second) {
        return false;
    }
    matches!((fs::read(a), fs::read(b)), (Ok(first), Ok(second)) if first == second)
}

fn link(bin: &Path) -> anyhow::Result<()> {
    let path = bin.join(SHIM);
    if fs::read_link(&path).is_ok_and(|to| to == Path::new("mvm")) {
        return line(&format!("{} is there", path.display()));
    }
    // What stands in the way is a former version's or somebody's own: only links are replaced.
    if fs::symlink_metadata(&path).is_ok_and(|about| !about.is_symlink()) {
        bail!("{} is a file, and not of this command's making: remove it first", path.display());
    }
    let _ = fs::remove_file(&path);
    symlink("mvm", &path).with_context(|| format!("cannot make {}", path.display()))?;
    line(&format!("{} installed", path.display()))
}

fn remove_link(bin: &Path) -> anyhow::Result<()> {
    let path = bin.join(SHIM);
    match fs::read_link(&path) {
        Ok(to) if to == Path::new("mvm") => remove(&path),
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => line(&format!("{} removed", path.display())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// A change of containerd's configuration.
type Change = fn(&str) -> Result<containerd::Changed, containerd::ConfigError>;

fn configure(path: &Path, args: &InstallArgs, change: Change) -> anyhow::Result<()> {
    // Where it really is: a link to it stays one.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let shown = path.display();
    let before = match fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e).with_context(|| format!("cannot read {shown}")),
    };
    let changed = change(before.as_deref().unwrap_or_default())
        .with_context(|| format!("cannot change {shown}"))?;
    for warning in &changed.warnings {
        complain(&format!("{shown}: {warning}"));
    }
    let Some(text) = changed.text else {
        return line(&format!("{shown} is as it should be"));
    };
    let backup = beside(&path, ".before-mvm");
    if args.undo && is_what_it_was(&backup, before.is_some(), &text) {
        remove(&backup)?;
        if containerd::is_ours_alone(&text) {
            return remove(&path);
        }
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let mode = fs::metadata(&path).map_or(0o644, |about| about.permissions().mode() & 0o7777);
    let file = new_beside(&path)?;
    fs::write(file.path(), &text).with_context(|| format!("cannot write {shown}"))?;
    if args.destdir.is_none() {
        check(file.path()).with_context(|| format!("{shown} is left as it is"))?;
    }
    if !args.undo && before.is_some() && !backup.exists() {
        fs::copy(&path, &backup).with_context(|| format!("cannot write {}", backup.display()))?;
    }
    replace(file, &path, mode)?;
    line(&format!("{shown} changed: start containerd anew (systemctl restart containerd)"))
}

/// True if undoing leads back to where it began.
fn is_what_it_was(backup: &Path, existed: bool, text: &str) -> bool {
    match fs::read_to_string(backup) {
        Ok(first) => first == text,
        Err(_) => existed && containerd::is_ours_alone(text),
    }
}

/// Asks containerd, if it is here, whether it understands the file.
fn check(path: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("containerd");
    command.arg("--config").arg(path).args(["config", "dump"]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let errors = tempfile::tempfile().context("cannot make a temporary file")?;
    command.stderr(errors.try_clone().context("no more descriptors")?);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).context("cannot start containerd to check its configuration"),
    };
    let until = Instant::now() + CHECK;
    let status = loop {
        match child.try_wait().context("cannot wait for containerd")? {
            Some(status) => break status,
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(10)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("containerd does not say whether it accepts the new one");
            }
        }
    };
    if status.success() {
        return Ok(());
    }
    let said = io::read_to_string({
        use std::io::Seek;
        let mut errors = errors;
        errors.rewind().context("cannot read what containerd says")?;
        errors
    })
    .unwrap_or_default();
    bail!(
        "containerd does not accept the new one: {}",
        said.split_whitespace().collect::<Vec<_>>().join(" ")
    )
}

/// A file that is going to be at `path`.
fn new_beside(path: &Path) -> anyhow::Result<NamedTempFile> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    NamedTempFile::new_in(dir).with_context(|| {
        format!("cannot write into {} (it usually takes root: sudo mvm install ...)", dir.display())
    })
}

/// Gives a complete file its name.
fn replace(file: NamedTempFile, path: &Path, mode: u32) -> anyhow::Result<()> {
    let failed = || format!("cannot write {}", path.display());
    file.as_file().set_permissions(Permissions::from_mode(mode)).with_context(failed)?;
    file.as_file().sync_all().with_context(failed)?;
    file.persist(path).map_err(|e| e.error).with_context(failed)?;
    Ok(())
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}
