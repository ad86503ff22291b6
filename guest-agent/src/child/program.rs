//! Finding and executing the program of a process.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};

use crate::error::{Error, Result};
use crate::spec::Process;
use crate::sys;

/// Where programs are looked for if the process's environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// All that exec needs, ready.
#[derive(Debug)]
pub struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// Resolves the program in the current root, as the current user, with the process's own PATH.
///
/// # Errors
/// [`Error::ProgramNotFound`] and [`Error::NotExecutable`] decide the exit code.
pub fn prepare(process: &Process, home: Option<&str>) -> Result<Program> {
    let args = process.args.as_deref().unwrap_or_default();
    let Some(name) = args.first() else {
        return Err(Error::Invalid("process.args: there is no program to run".into()));
    };
    let mut env: Vec<String> = process.env.clone().unwrap_or_default();
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", home.unwrap_or("/")));
    }
    let path = find(name, search_path(&env))?;
    let c_string = |text: &[u8], what: &str| {
        CString::new(text).map_err(|_| Error::Invalid(format!("process.{what}: has a zero byte")))
    };
    Ok(Program {
        path: c_string(path.as_os_str().as_bytes(), "args")?,
        args: args.iter().map(|a| c_string(a.as_bytes(), "args")).collect::<Result<_>>()?,
        env: env.iter().map(|e| c_string(e.as_bytes(), "env")).collect::<Result<_>>()?,
    })
}

fn search_path(env: &[String]) -> &str {
    env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH)
}

/// Finds a program by name. A name with a slash is a path already.
fn find(name: &str, search: &str) -> Result<PathBuf> {
    if name.is_empty() {
        return Err(Error::ProgramNotFound("the name of the program is empty".into()));
    }
    if name.contains('/') {
        return check(Path::new(name)).map(|()| name.into());
    }
    let mut refused = None;
    for dir in search.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = Path::new(dir).join(name);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            // As with execvp: look on, but say "not executable" if nothing better is found.
            Err(e @ Error::NotExecutable(_)) => refused = refused.or(Some(e)),
            Err(_) => {}
        }
    }
    Err(refused.unwrap_or_else(|| {
        Error::ProgramNotFound(format!("{name:?}: no such program in PATH ({search})"))
    }))
}

fn check(path: &Path) -> Result<()> {
    let shown = path.display();
    let not_executable = |why: &str| Err(Error::NotExecutable(format!("{shown}: {why}")));
    match stat(path) {
        Ok(found) => match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return not_executable("is a directory"),
            _ => return not_executable("is not a regular file"),
        },
        Err(e @ (rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR)) => {
            return Err(Error::ProgramNotFound(format!("{shown}: {}", describe(e))));
        }
        Err(e) => return not_executable(&describe(e)),
    }
    match accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => Ok(()),
        Err(e) => not_executable(&describe(e)),
    }
}

fn describe(errno: rustix::io::Errno) -> String {
    Errno::from_raw(errno.raw_os_error()).desc().into()
}

impl Program {
    /// Replaces this process. Returns only the reason why that failed.
    pub fn exec(&self) -> Error {
        fn borrow(strings: &[CString]) -> Vec<&CStr> {
            strings.iter().map(CString::as_c_str).collect()
        }
        let errno = sys::exec(&self.path, &borrow(&self.args), &borrow(&self.env));
        let message = format!("{}: {}", self.path.to_string_lossy(), errno.desc());
        match errno {
            // The file was there a moment ago: its interpreter is not.
            Errno::ENOENT => Error::ProgramNotFound(format!(
                "{message} (the program or the interpreter or loader it names does not exist)"
            )),
            Errno::ENOEXEC => Error::NotExecutable(format!(
                "{message} (neither a program for this machine nor a script with a #! line)"
            )),
            _ => Error::NotExecutable(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(dir: &Path, name: &str, mode: u32) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn path_lookup_tells_missing_from_not_executable() {
        let dir = tempfile::tempdir().unwrap();
        file(dir.path(), "a/plain", 0o644);
        file(dir.path(), "b/plain", 0o755);
        file(dir.path(), "a/only", 0o644);
        std::fs::create_dir(dir.path().join("a/dir")).unwrap();
        let search = format!("{0}/missing:{0}/a:{0}/b", dir.path().display());

        assert_eq!(find("plain", &search).unwrap(), dir.path().join("b/plain"));
        assert!(matches!(find("only", &search), Err(Error::NotExecutable(_))));
        assert!(matches!(find("dir", &search), Err(Error::NotExecutable(_))));
        assert!(matches!(find("none", &search), Err(Error::ProgramNotFound(_))));
        assert!(matches!(find("", &search), Err(Error::ProgramNotFound(_))));
    }

    #[test]
    fn names_with_a_slash_are_not_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        file(dir.path(), "tool", 0o755);
        let path = dir.path().join("tool");
        let text = path.to_str().unwrap();
        assert_eq!(find(text, "/nowhere").unwrap(), path);
        let through = format!("{text}/x");
        assert!(matches!(find(&through, ""), Err(Error::ProgramNotFound(_))));
        assert!(matches!(find("./none", "/bin"), Err(Error::ProgramNotFound(_))));
    }

    #[test]
    fn the_last_path_of_an_environment_counts_and_there_is_a_default() {
        let env = ["PATH=/a".to_owned(), "X=PATH=/c".into(), "PATH=/b".into()];
        assert_eq!(search_path(&env), "/b");
        assert_eq!(search_path(&[]), DEFAULT_PATH);
    }

    #[test]
    fn home_is_added_only_if_missing() {
        let process = |env: &str| -> Process {
            let json = format!(r#"{{"cwd":"/","args":["/bin/sh"],"user":{{}},"env":[{env}]}}"#);
            serde_json::from_str(&json).unwrap()
        };
        let env = |process: &Process| prepare(process, Some("/home/x")).unwrap().env;
        assert_eq!(env(&process("")), [c"HOME=/home/x".to_owned()]);
        assert_eq!(env(&process("\"HOME=/y\"")), [c"HOME=/y".to_owned()]);
    }

    #[test]
    fn zero_bytes_are_refused() {
        let json = r#"{"cwd":"/","args":["/bin/sh","a\u0000b"],"user":{}}"#;
        let process: Process = serde_json::from_str(json).unwrap();
        assert!(matches!(prepare(&process, None), Err(Error::Invalid(_))));
    }
}
