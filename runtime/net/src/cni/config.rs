//! Network configurations: `NAME.conflist`, or `NAME.conf` with a single plugin.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Error;

/// Longest configuration that is read.
const MAX: u64 = 1 << 20;
/// The version of a configuration that names none (CNI specification 0.1).
const FIRST_VERSION: &str = "0.1.0";

/// Where configurations and plugins are.
#[derive(Debug, Clone)]
pub struct Places {
    /// Directories with configurations, the first one that has a network of the name wins.
    pub config_dirs: Vec<PathBuf>,
    /// Directories with plugins.
    pub plugin_dirs: Vec<PathBuf>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            config_dirs: vec!["/etc/cni/net.d".into()],
            plugin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
        }
    }
}

impl Places {
    /// The file of a plugin.
    pub(super) fn plugin(&self, name: &str) -> Result<PathBuf, Error> {
        find_plugin(&self.plugin_dirs, name)
    }
}

pub(super) fn find_plugin(directories: &[PathBuf], name: &str) -> Result<PathBuf, Error> {
    let missing = || Error::NoPlugin { name: name.into(), directories: directories.to_vec() };
    // It is one component of a path, or it would lead out of the directories.
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(missing());
    }
    let files = directories.iter().map(|directory| directory.join(name));
    files.into_iter().find(|file| file.is_file()).ok_or_else(missing)
}

/// A network: plugins with their configurations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    name: String,
    version: String,
    plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// Finds the network called `name`.
    pub(super) fn find(places: &Places, name: &str) -> Result<Self, Error> {
        let mut known = Vec::new();
        for directory in &places.config_dirs {
            for path in files(directory) {
                match Self::read(&path) {
                    Ok(network) if network.name == name => return Ok(network),
                    Ok(network) => known.push(network.name),
                    // Another one's mistake is not ours, unless it would have been the one.
                    Err(e) if path.file_stem().is_some_and(|stem| stem == name) => return Err(e),
                    Err(e) => tracing::debug!("{e}"),
                }
            }
        }
        let directories = places.config_dirs.clone();
        Err(Error::NoNetwork { name: name.into(), directories, known })
    }

    fn read(path: &Path) -> Result<Self, Error> {
        let failed = |what: String| Error::Config { path: path.to_owned(), what };
        let len = fs::metadata(path).map_err(|e| failed(e.to_string()))?.len();
        if len > MAX {
            return Err(failed(format!("it has {len} bytes, at most {MAX} are taken")));
        }
        let text = fs::read(path).map_err(|e| failed(e.to_string()))?;
        let json = serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))?;
        Self::parse(json).map_err(failed)
    }

    fn parse(json: Value) -> Result<Self, String> {
        let Value::Object(mut json) = json else { return Err("it is no JSON object".into()) };
        let text = |json: &Map<String, Value>, key: &str| {
            json.get(key).and_then(Value::as_str).map(str::to_owned)
        };
        let name = text(&json, "name").ok_or("it has no name")?;
        // It becomes part of file names and rules.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(format!("its name {name:?} is not of letters, digits, _ . and -"));
        }
        let version = text(&json, "cniVersion").unwrap_or_else(|| FIRST_VERSION.into());
        let plugins = match json.remove("plugins") {
            Some(Value::Array(all)) => all,
            Some(_) => return Err("its plugins are no list".into()),
            None => vec![Value::Object(json)],
        };
        let mut objects = Vec::new();
        for plugin in plugins {
            match plugin {
                Value::Object(plugin) if plugin.get("type").is_some_and(Value::is_string) => {
                    objects.push(plugin);
                }
                other => return Err(format!("the plugin {other} has no type")),
            }
        }
        if objects.is_empty() {
            return Err("it has no plugins".into());
        }
        Ok(Self { name, version, plugins: objects })
    }

    /// Number of plugins.
    pub(super) fn len(&self) -> usize {
        self.plugins.len()
    }

    /// Their types.
    pub(super) fn plugins(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).map(|index| self.plugin_type(index))
    }

    pub(super) fn plugin_type(&self, index: usize) -> &str {
        let plugin = self.plugins.get(index);
        plugin.and_then(|p| p.get("type")).and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether a plugin takes port mappings.
    pub(super) fn publishes_ports(&self) -> bool {
        self.plugins.iter().any(|plugin| has_capability(plugin, "portMappings"))
    }

    /// What a plugin is given on its standard input: its configuration with the list's name and
    /// version, of `runtime` what it has the capabilities for, and what the last plugin said.
    pub(super) fn plugin_config(
        &self,
        index: usize,
        runtime: &Value,
        previous: Option<&Value>,
    ) -> Value {
        let mut config = self.plugins.get(index).cloned().unwrap_or_default();
        config.insert("name".into(), json!(self.name));
        config.insert("cniVersion".into(), json!(self.version));
        let values = runtime.as_object().into_iter().flatten();
        let able: Map<String, Value> = values
            .filter(|(key, _)| has_capability(&config, key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if !able.is_empty() {
            config.insert("runtimeConfig".into(), Value::Object(able));
        }
        if let Some(previous) = previous {
            config.insert("prevResult".into(), previous.clone());
        }
        Value::Object(config)
    }
}

fn has_capability(plugin: &Map<String, Value>, name: &str) -> bool {
    plugin.get("capabilities").and_then(|c| c.get(name)).and_then(Value::as_bool) == Some(true)
}

/// The configurations in a directory, in the order of their names.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension().is_some_and(|e| e == "conflist" || e == "conf" || e == "json")
        })
        .collect();
    files.sort();
    files
}

pub(super) fn list(directories: &[PathBuf]) -> String {
    let all: Vec<_> = directories.iter().map(|d| d.display().to_string()).collect();
    all.join(" or ")
}

pub(super) fn known(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; there are {}", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(files: &[(&str, &str)]) -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let path = dir.path().to_owned();
        (dir, Places { config_dirs: vec![path.clone()], plugin_dirs: vec![path] })
    }

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"web","plugins":[
        {"type":"bridge","ipam":{"type":"host-local"}},
        {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

    #[test]
    fn a_network_is_found_by_the_name_inside() {
        let (_dir, places) = places(&[
            ("10-x.conflist", LIST),
            ("20-y.conf", r#"{"cniVersion":"0.3.1","name":"single","type":"ptp"}"#),
            ("30-bad.conf", "{"),
            ("readme", "no configuration"),
        ]);
        let web = Network::find(&places, "web").unwrap();
        assert_eq!(web.plugins().collect::<Vec<_>>(), ["bridge", "portmap"]);
        assert!(web.publishes_ports());
        let single = Network::find(&places, "single").unwrap();
        assert_eq!((single.len(), single.plugin_type(0)), (1, "ptp"));
        assert!(!single.publishes_ports());
        let error = Network::find(&places, "nope").unwrap_err().to_string();
        assert!(error.contains("\"nope\"") && error.contains("web, single"), "{error}");
        assert!(matches!(Network::find(&places, "30-bad"), Err(Error::Config { .. })));
    }

    #[test]
    fn a_plugin_gets_what_it_is_capable_of() {
        let network = Network::parse(serde_json::from_str(LIST).unwrap()).unwrap();
        let runtime = json!({ "portMappings": [{ "hostPort": 1 }] });
        let bridge = network.plugin_config(0, &runtime, None);
        assert_eq!(bridge["name"], "web");
        assert_eq!(bridge["cniVersion"], "1.0.0");
        assert_eq!(bridge["ipam"]["type"], "host-local");
        assert!(bridge.get("runtimeConfig").is_none() && bridge.get("prevResult").is_none());
        let previous = json!({ "ips": [] });
        let portmap = network.plugin_config(1, &runtime, Some(&previous));
        assert_eq!(portmap["runtimeConfig"], runtime);
        assert_eq!(portmap["prevResult"], previous);
    }

    #[test]
    fn configurations_that_cannot_be_used_say_why() {
        for (text, want) in [
            ("[]", "no JSON object"),
            ("{}", "no name"),
            (r#"{"name":"a b"}"#, "\"a b\""),
            (r#"{"name":"a","plugins":{}}"#, "no list"),
            (r#"{"name":"a","plugins":[]}"#, "no plugins"),
            (r#"{"name":"a","plugins":[{}]}"#, "no type"),
            (r#"{"name":"a"}"#, "no type"),
        ] {
            let error = Network::parse(serde_json::from_str(text).unwrap()).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn plugins_are_files_in_the_directories() {
        let (_dir, places) = places(&[("bridge", "")]);
        places.plugin("bridge").unwrap();
        for bad in ["", ".", "..", "../bridge", "no-such"] {
            assert!(matches!(places.plugin(bad), Err(Error::NoPlugin { .. })), "{bad}");
        }
    }
}
