//! The container's mounts: docker's defaults, `--tmpfs`, and files that the host provides.

use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::image::Config as ImageConfig;
use oci_spec::runtime::{Mount, MountBuilder};

use super::volumes::{Volume, normal};
use super::{Error, Options, PROVIDED_DIR, ProvidedFile, parse_size};

/// `--tmpfs PATH[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    pub(super) path: String,
    options: Vec<String>,
}

impl FromStr for Tmpfs {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |rule: String| Error::Invalid { what: "tmpfs", value: text.into(), rule };
        let (path, given) = text.split_once(':').unwrap_or((text, ""));
        if !path.starts_with('/') {
            return Err(invalid("the path must be absolute, as in /run:size=64m".into()));
        }
        let mut options: Vec<String> =
            ["noexec", "nosuid", "nodev"].iter().map(ToString::to_string).collect();
        for option in given.split(',').filter(|o| !o.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match (key, value) {
                ("size", size) if !size.ends_with('%') => {
                    let bytes = parse_size(size).map_err(|e| invalid(e.to_string()))?;
                    options.push(format!("size={bytes}"));
                }
                ("size" | "mode" | "uid" | "gid" | "nr_inodes" | "nr_blocks" | "huge", v)
                    if !v.is_empty() =>
                {
                    options.push(option.to_owned());
                }
                (flag @ ("exec" | "suid" | "dev"), "") => {
                    options.retain(|o| o.strip_prefix("no") != Some(flag));
                    options.push(flag.to_owned());
                }
                (
                    "ro" | "rw" | "noexec" | "nosuid" | "nodev" | "sync" | "async" | "atime"
                    | "noatime" | "relatime" | "strictatime" | "diratime" | "nodiratime",
                    "",
                ) => {
                    options.retain(|o| o != option);
                    options.push(option.to_owned());
                }
                _ => return Err(invalid(format!("unknown option {option:?}"))),
            }
        }
        Ok(Self { path: path.to_owned(), options })
    }
}

fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, Error> {
    Ok(MountBuilder::default()
        .destination(PathBuf::from(target))
        .typ(kind)
        .source(PathBuf::from(source))
        .options(options.iter().map(ToString::to_string).collect::<Vec<_>>())
        .build()?)
}

/// All mounts, parents before children.
pub fn all(
    image: &ImageConfig,
    options: &Options,
    files: &[ProvidedFile],
    shared: &[Volume],
) -> Result<Vec<Mount>, Error> {
    let access = if options.privileged { "rw" } else { "ro" };
    let quiet = ["nosuid", "noexec", "nodev"];
    let pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    let shm = ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"];
    let sys = ["nosuid", "noexec", "nodev", access];
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &quiet)?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount("/dev/pts", "devpts", "devpts", &pts)?,
        mount("/dev/shm", "tmpfs", "shm", &shm)?,
        mount("/dev/mqueue", "mqueue", "mqueue", &quiet)?,
        mount("/sys", "sysfs", "sysfs", &sys)?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &sys)?,
    ];
    for file in files {
        let source = format!("{PROVIDED_DIR}/{}", file.name);
        mounts.push(mount(&format!("/etc/{}", file.name), "bind", &source, &["bind", "rw"])?);
    }
    // What an image declares a volume can be written even where the root cannot.
    if options.read_only {
        let mut volumes: Vec<String> = image.volumes().iter().flatten().cloned().collect();
        volumes.sort();
        let taken = |path: &str| {
            options.tmpfs.iter().any(|t| t.path == path)
                || shared.iter().any(|v| normal(&v.bind.target) == normal(path))
        };
        for path in volumes.iter().filter(|p| !taken(p)) {
            mounts.push(mount(path, "tmpfs", "tmpfs", &["nodev", "tmpcopyup"])?);
        }
    }
    for tmpfs in &options.tmpfs {
        let options: Vec<&str> = tmpfs.options.iter().map(String::as_str).collect();
        mounts.push(mount(&tmpfs.path, "tmpfs", "tmpfs", &options)?);
    }
    for volume in shared {
        let source = format!("{PROVIDED_DIR}/{}", volume.name);
        let access = if volume.bind.read_only { "ro" } else { "rw" };
        let made = mount(&volume.bind.target, "bind", &source, &["rbind", "rprivate", access])?;
        // What the user brings takes the place of what is there by default.
        let target = normal(&volume.bind.target);
        match mounts.iter_mut().find(|m| normal(m.destination()) == target) {
            Some(default) => *default = made,
            None => mounts.push(made),
        }
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Vec<String> {
        text.parse::<Tmpfs>().unwrap().options
    }

    #[test]
    fn tmpfs_defaults_are_dockers_and_can_be_lifted() {
        assert_eq!(options("/run"), ["noexec", "nosuid", "nodev"]);
        assert_eq!(options("/run:exec,size=1m"), ["nosuid", "nodev", "exec", "size=1048576"]);
        assert_eq!(options("/run:rw,mode=1770"), ["noexec", "nosuid", "nodev", "rw", "mode=1770"]);
    }

    #[test]
    fn bad_tmpfs_is_refused() {
        for bad in ["run", "", "/run:size=lots", "/run:bogus", "/run:mode", "/run:exec=1"] {
            assert!(bad.parse::<Tmpfs>().is_err(), "{bad}");
        }
    }
}
