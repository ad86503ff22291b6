//! Variables from flags and files, with docker's rules.

use std::path::Path;

use anyhow::{Context, bail};

/// `KEY=VALUE` as it is; a bare `KEY` takes its value from our environment, and is left out where
/// that has none.
pub fn resolve(entry: &str) -> anyhow::Result<Option<String>> {
    let (name, has_value) = match entry.split_once('=') {
        Some((name, _)) => (name, true),
        None => (entry, false),
    };
    if name.is_empty() {
        bail!("invalid environment variable {entry:?}: the name is empty");
    }
    if has_value {
        return Ok(Some(entry.to_owned()));
    }
    Ok(std::env::var(name).ok().map(|value| format!("{name}={value}")))
}

/// The variables of a file: one a line, `#` begins a comment line, values are taken as they are.
pub fn read(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the environment file {}", path.display()))?;
    parse(&text).with_context(|| format!("in the environment file {}", path.display()))
}

fn parse(text: &str) -> anyhow::Result<Vec<String>> {
    let mut variables = Vec::new();
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split('=').next().unwrap_or_default();
        if name.is_empty() || name.contains(char::is_whitespace) {
            bail!("line {}: {line:?} is not KEY=VALUE", number + 1);
        }
        variables.extend(resolve(line)?);
    }
    Ok(variables)
}

/// Those of the files first, then those of the flags, which win.
pub fn collect(files: &[std::path::PathBuf], flags: &[String]) -> anyhow::Result<Vec<String>> {
    let mut variables = Vec::new();
    for file in files {
        variables.extend(read(file)?);
    }
    for flag in flags {
        variables.extend(resolve(flag)?);
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_blank_lines_and_quotes_are_dockers() {
        let text = "# c\n\n A=1\nB=\"q\" # no comment\nC=\nMVM_NO_SUCH_VARIABLE\n";
        assert_eq!(parse(text).unwrap(), ["A=1", "B=\"q\" # no comment", "C="]);
    }

    #[test]
    fn bad_lines_are_named() {
        let e = parse("A=1\nB C=2\n").unwrap_err();
        assert!(e.to_string().contains("line 2"), "{e}");
        assert!(parse("=1").is_err());
    }

    #[test]
    fn bare_names_take_our_value() {
        assert_eq!(resolve("MVM_NO_SUCH_VARIABLE").unwrap(), None);
        let path = std::env::var("PATH").unwrap();
        assert_eq!(resolve("PATH").unwrap(), Some(format!("PATH={path}")));
        assert!(resolve("").is_err() && resolve("=x").is_err());
    }
}
