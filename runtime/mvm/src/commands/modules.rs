//! `--initrd` of a multiboot kernel: its modules, in the form that PC emulators take.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use mvm_sandbox::machine::Payload;
use mvm_vmm::config::{MAX_MODULE_TEXT, MAX_MODULES};

use crate::embedded;

/// The one initrd of a kernel that has no modules.
///
/// # Errors
/// There are several.
pub fn single(initrds: &[PathBuf]) -> anyhow::Result<Option<&Path>> {
    match initrds {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        _ => bail!("--initrd: there can be one; several are for --unikernel multiboot"),
    }
}

/// Opens `FILE WORDS,FILE WORDS,...`, of each of `initrds`. The kernel is told the file's name,
/// without its directory, and the words.
///
/// # Errors
/// A file cannot be used, or there are too many.
pub fn open(initrds: &[PathBuf]) -> anyhow::Result<Vec<(Payload, String)>> {
    let mut modules = Vec::new();
    for list in initrds {
        let Some(list) = list.to_str() else {
            bail!("--initrd {}: a module's name has to be UTF-8", list.display());
        };
        for module in split(list) {
            modules.push(open_one(&module).with_context(|| format!("--initrd {list}"))?);
        }
    }
    if modules.len() > MAX_MODULES {
        bail!("--initrd: there are {} modules, and can be {MAX_MODULES}", modules.len());
    }
    Ok(modules)
}

/// The parts of `list` between its commas; two commas are one that is part of a name.
fn split(list: &str) -> Vec<String> {
    const COMMA: char = '\0';
    let marked = list.replace(",,", &COMMA.to_string());
    marked.split(',').map(|part| part.replace(COMMA, ",")).collect()
}

fn open_one(module: &str) -> anyhow::Result<(Payload, String)> {
    let (path, words) = module.split_once(' ').unwrap_or((module, ""));
    if path.is_empty() {
        bail!("there is a module without a name");
    }
    let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
    let text = if words.is_empty() { name.into_owned() } else { format!("{name} {words}") };
    if text.len() > MAX_MODULE_TEXT || text.contains(char::is_control) {
        bail!(
            "name and words of a module are {} bytes without control characters at most, which \
             {text:?} is not",
            MAX_MODULE_TEXT
        );
    }
    Ok((embedded::initramfs(Some(Path::new(path)))?, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_taken_apart_at_single_commas() {
        assert_eq!(split("a x=1,b"), ["a x=1", "b"]);
        assert_eq!(split("a,,b,c"), ["a,b", "c"]);
        assert_eq!(split(""), [""]);
    }

    #[test]
    fn modules_are_told_by_name_and_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("env"), "A=b\n").unwrap();
        std::fs::write(path("disk"), "x").unwrap();
        let lists = [format!("{} a=1 b,{}", path("env"), path("disk")), path("env")];
        let opened = open(&lists.map(PathBuf::from)).unwrap();
        let texts: Vec<&str> = opened.iter().map(|(_, text)| &**text).collect();
        assert_eq!(texts, ["env a=1 b", "disk", "env"]);

        let refused = |list: String| format!("{:#}", open(&[list.into()]).unwrap_err());
        assert!(refused(path("nowhere")).contains("nowhere"));
        assert!(refused(format!("{},", path("env"))).contains("without a name"));
        assert!(refused(format!("{} {}", path("env"), "x".repeat(130))).contains("127 bytes"));
        let many = vec![path("env"); 16].join(",");
        assert!(refused(many).contains("16 modules"));
        assert!(single(&["a".into(), "b".into()]).is_err());
    }
}
