//! containerd's configuration: the runtime `mvm` of its CRI plugin, and nothing else of it changed.

use toml_edit::{DocumentMut, Item, Table, TomlError, value};

/// The runtime's name, which is the handler of a RuntimeClass.
const HANDLER: &str = "mvm";

/// What containerd calls the shim.
const RUNTIME: &str = "io.containerd.mvm.v1";

/// The version that is written where there is no configuration: containerd 1.5 and later read it.
const VERSION: i64 = 2;

/// Why a configuration is not changed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is no TOML.
    #[error("it is not TOML: {0}")]
    Toml(String),
    /// Version 1, or one that is not known here.
    #[error(
        "it is of version {0}, this command knows 2 and 3 (`containerd config migrate` or \
         `containerd config default` give one of those)"
    )]
    Version(i64),
    /// Somebody else has a runtime of that name.
    #[error(
        "it has a runtime {HANDLER:?} already, which is {0} and not {RUNTIME}: remove it first"
    )]
    Taken(String),
    /// Something that should be a table is not.
    #[error("`{0}` is not a table in it")]
    Shape(String),
}

/// What comes of a change.
#[derive(Debug)]
pub struct Changed {
    /// The new configuration, if it is another.
    pub text: Option<String>,
    /// What will not work all the same.
    pub warnings: Vec<String>,
}

/// Adds the runtime.
pub fn add(text: &str) -> Result<Changed, ConfigError> {
    let mut doc = parse(text)?;
    let mut warnings = Vec::new();
    if is_cri_off(&doc) {
        warnings.push(
            "CRI is switched off by `disabled_plugins`: Kubernetes will not reach containerd"
                .into(),
        );
    }
    let version = version(&doc)?;
    if doc.get("version").is_none() {
        doc.insert("version", value(version));
    }
    let mut table = doc.as_table_mut();
    let path = path(version)?;
    for (depth, key) in path.iter().enumerate() {
        let shape = || ConfigError::Shape(path[..=depth].join("."));
        let item = table.entry(key).or_insert_with(|| {
            let mut table = Table::new();
            // A header of its own only for what has something of its own.
            table.set_implicit(true);
            Item::Table(table)
        });
        table = item.as_table_mut().ok_or_else(shape)?;
    }
    match table.get(HANDLER).map(runtime_type) {
        Some(Some(RUNTIME)) => return Ok(Changed { text: None, warnings }),
        Some(other) => {
            return Err(ConfigError::Taken(other.unwrap_or("of no type").to_owned()));
        }
        None => {}
    }
    let mut runtime = Table::new();
    runtime.insert("runtime_type", value(RUNTIME));
    table.insert(HANDLER, Item::Table(runtime));
    Ok(Changed { text: Some(doc.to_string()), warnings })
}

/// Removes the runtime.
pub fn remove(text: &str) -> Result<Changed, ConfigError> {
    let unchanged = Changed { text: None, warnings: Vec::new() };
    let mut doc = parse(text)?;
    let Ok(path) = version(&doc).and_then(path) else { return Ok(unchanged) };
    let mut table = doc.as_table_mut();
    for key in path {
        match table.get_mut(key).and_then(Item::as_table_mut) {
            Some(next) => table = next,
            None => return Ok(unchanged),
        }
    }
    if table.get(HANDLER).map(runtime_type) != Some(Some(RUNTIME)) {
        return Ok(unchanged);
    }
    table.remove(HANDLER);
    Ok(Changed { text: Some(doc.to_string()), warnings: Vec::new() })
}

/// True for what this module writes where nothing was, without the runtime.
pub fn is_ours_alone(text: &str) -> bool {
    text.trim() == format!("version = {VERSION}")
}

fn parse(text: &str) -> Result<DocumentMut, ConfigError> {
    text.parse().map_err(|e: TomlError| {
        // Its message draws the line, which takes several.
        let line = e.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
        ConfigError::Toml(format!("line {line}: {}", e.message().replace('\n', ", ")))
    })
}

/// The configuration's version: 1 if it does not say (containerd's `ops.md`), unless it is empty.
fn version(doc: &DocumentMut) -> Result<i64, ConfigError> {
    match doc.get("version") {
        Some(item) => item.as_integer().ok_or_else(|| ConfigError::Shape("version".into())),
        None if doc.is_empty() => Ok(VERSION),
        None => Ok(1),
    }
}

/// Where runtimes are.
fn path(version: i64) -> Result<[&'static str; 4], ConfigError> {
    let plugin = match version {
        2 => "io.containerd.grpc.v1.cri",
        3 => "io.containerd.cri.v1.runtime",
        other => return Err(ConfigError::Version(other)),
    };
    Ok(["plugins", plugin, "containerd", "runtimes"])
}

fn runtime_type(item: &Item) -> Option<&str> {
    item.get("runtime_type").and_then(Item::as_str)
}

fn is_cri_off(doc: &DocumentMut) -> bool {
    let off = doc.get("disabled_plugins").and_then(Item::as_array);
    off.is_some_and(|off| {
        off.iter().filter_map(|v| v.as_str()).any(|name| {
            name == "cri"
                || name.starts_with("io.containerd.grpc.v1.cri")
                || name.starts_with("io.containerd.cri.v1")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(text: &str) -> String {
        add(text).unwrap().text.unwrap()
    }

    #[test]
    fn an_empty_configuration_gets_the_runtime_alone() {
        let text = added("");
        let want = "version = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.mvm]\n\
                    runtime_type = \"io.containerd.mvm.v1\"\n";
        assert_eq!(text, want);
        assert!(add(&text).unwrap().text.is_none(), "once is enough");
        let removed = remove(&text).unwrap().text.unwrap();
        assert!(is_ours_alone(&removed), "{removed:?}");
    }

    #[test]
    fn all_else_stays_to_the_letter() {
        let text = "# ours\nversion = 2\nroot = \"/data\" # large\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
                    sandbox_image = 'pause:3'\n    [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n      \
                    default_runtime_name = \"runc\"\n";
        let with = added(text);
        assert!(with.starts_with(text), "{with}");
        assert!(with.contains("runtimes.mvm]"), "{with}");
        assert_eq!(remove(&with).unwrap().text.unwrap(), text);
        assert!(remove(text).unwrap().text.is_none());
    }

    #[test]
    fn version_3_has_another_plugin() {
        let with = added("version = 3\n");
        assert!(
            with.contains("plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.mvm"),
            "{with}"
        );
        assert_eq!(remove(&with).unwrap().text.unwrap().trim(), "version = 3");
    }

    #[test]
    fn what_cannot_be_changed_rightly_is_not_changed() {
        let taken = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.mvm]\nruntime_type = \"x\"\n";
        assert!(matches!(add(taken), Err(ConfigError::Taken(other)) if other == "x"));
        assert!(remove(taken).unwrap().text.is_none());
        assert!(matches!(add("oom_score = 1\n"), Err(ConfigError::Version(1))));
        assert!(matches!(add("version = 9\n"), Err(ConfigError::Version(9))));
        assert!(matches!(add("version = 2\nplugins = 1\n"), Err(ConfigError::Shape(_))));
        assert!(matches!(add("version = \n"), Err(ConfigError::Toml(_))));
        let off = add("version = 2\ndisabled_plugins = [\"cri\"]\n").unwrap();
        assert_eq!(off.warnings.len(), 1);
    }
}
