//! Options of mounts, as mount(8) knows them.

use nix::mount::MsFlags;

/// What the options of a mount mean to mount(2).
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub flags: MsFlagsValue,
    pub propagation: Option<MsFlags>,
    pub data: Vec<String>,
}

/// Flags with a default.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MsFlagsValue(pub MsFlags);

impl Default for MsFlagsValue {
    fn default() -> Self {
        Self(MsFlags::empty())
    }
}

pub(super) fn options(words: &[String]) -> Options {
    let mut options = Options::default();
    for word in words {
        let (flag, on) = match word.as_str() {
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "diratime" => (MsFlags::MS_NODIRATIME, false),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "norelatime" => (MsFlags::MS_RELATIME, false),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, true),
            "defaults" | "" => continue,
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "unbindable"
            | "runbindable" => {
                options.propagation = Some(propagation(word));
                continue;
            }
            _ => {
                options.data.push(word.clone());
                continue;
            }
        };
        options.flags.0.set(flag, on);
    }
    options
}

fn propagation(word: &str) -> MsFlags {
    let (deep, kind) = match word.strip_prefix('r') {
        Some(kind) => (MsFlags::MS_REC, kind),
        None => (MsFlags::empty(), word),
    };
    deep | match kind {
        "slave" => MsFlags::MS_SLAVE,
        "shared" => MsFlags::MS_SHARED,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => MsFlags::MS_PRIVATE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(',').map(String::from).collect()
    }

    #[test]
    fn options_are_flags_propagation_and_data() {
        let found = options(&words("ro,nosuid,rslave,lowerdir=/a:/b,index=off,rw"));
        assert_eq!(found.flags.0, MsFlags::MS_NOSUID);
        assert_eq!(found.propagation, Some(MsFlags::MS_SLAVE | MsFlags::MS_REC));
        assert_eq!(found.data, ["lowerdir=/a:/b", "index=off"]);
        let found = options(&words("rbind,ro"));
        assert_eq!(found.flags.0, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
    }
}
