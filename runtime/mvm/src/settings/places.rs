//! Which `mvm.toml`s there are.

use std::path::{Path, PathBuf};

use super::Values;
use super::file::{self, Error};

/// The system's file.
const SYSTEM: &str = "/etc/mvm/mvm.toml";

/// Where settings are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Places {
    /// In one file, which has to be there.
    Given(PathBuf),
    /// In the system's and the user's, as far as they are there.
    Usual {
        /// The system's.
        system: PathBuf,
        /// The user's, which goes before it.
        user: Option<PathBuf>,
    },
}

impl Places {
    /// `--config`, else `MVM_CONFIG`, else the usual ones.
    pub fn current(flag: Option<&Path>) -> Self {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        let given = flag.map(Path::to_owned);
        let given = given.or_else(|| variable("MVM_CONFIG").filter(|p| !p.as_os_str().is_empty()));
        match given {
            Some(file) => Self::Given(file),
            None => Self::usual(variable("XDG_CONFIG_HOME"), variable("HOME")),
        }
    }

    fn usual(config_home: Option<PathBuf>, home: Option<PathBuf>) -> Self {
        // The XDG specification: a relative path is invalid and is to be ignored.
        let absolute = |path: Option<PathBuf>| path.filter(|p| p.is_absolute());
        let dir = absolute(config_home).or_else(|| absolute(home).map(|home| home.join(".config")));
        Self::Usual { system: SYSTEM.into(), user: dir.map(|dir| dir.join("mvm/mvm.toml")) }
    }
}

/// What the files say, the more important over the less important.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// The files looked for, and whether they are there; the most important first.
    pub files: Vec<(PathBuf, bool)>,
    /// Their values.
    pub(super) values: Values,
}

impl Config {
    /// Reads them.
    ///
    /// # Errors
    /// A file that is there cannot be read or says what cannot be, or the given one is not there.
    pub fn load(places: &Places) -> Result<Self, Error> {
        let files = match places {
            Places::Given(file) => vec![file],
            Places::Usual { system, user } => user.iter().chain([system]).collect(),
        };
        let mut config = Self::default();
        for path in files {
            let read = file::read(path)?;
            if read.is_none() && matches!(places, Places::Given(_)) {
                let source = std::io::ErrorKind::NotFound.into();
                return Err(Error::Read { path: path.clone(), source });
            }
            config.files.push((path.clone(), read.is_some()));
            config.values = config.values.over(read.unwrap_or_default());
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual(config_home: Option<&str>, home: Option<&str>) -> Option<PathBuf> {
        match Places::usual(config_home.map(Into::into), home.map(Into::into)) {
            Places::Usual { user, .. } => user,
            Places::Given(_) => panic!("given"),
        }
    }

    #[test]
    fn the_users_file_is_where_xdg_says() {
        let path = |p: &str| Some(PathBuf::from(p));
        assert_eq!(usual(Some("/c"), Some("/h")), path("/c/mvm/mvm.toml"));
        assert_eq!(usual(Some("relative"), Some("/h")), path("/h/.config/mvm/mvm.toml"));
        assert_eq!(usual(None, Some("/h")), path("/h/.config/mvm/mvm.toml"));
        assert_eq!(usual(None, None), None);
    }

    #[test]
    fn the_users_file_goes_before_the_systems() {
        let dir = tempfile::tempdir().unwrap();
        let (system, user) = (dir.path().join("system"), dir.path().join("user"));
        let places = Places::Usual { system: system.clone(), user: Some(user.clone()) };
        let none = Config::load(&places).unwrap();
        assert_eq!(none.files, [(user.clone(), false), (system.clone(), false)]);
        assert_eq!(none.values, Values::default());
        std::fs::write(&system, "cpus = 2\nmemory = \"1g\"\n").unwrap();
        std::fs::write(&user, "\ncpus = 3\n").unwrap();
        let values = Config::load(&places).unwrap().values;
        let (cpus, memory) = (values.cpus.unwrap(), values.memory.unwrap());
        assert_eq!(
            (cpus.value.as_str(), cpus.origin.to_string()),
            ("3", format!("{}:2", user.display()))
        );
        assert_eq!(
            (memory.value.as_str(), memory.origin.to_string()),
            ("1g", format!("{}:2", system.display()))
        );
    }

    #[test]
    fn a_given_file_replaces_both_and_has_to_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let given = Places::Given(dir.path().join("x.toml"));
        let error = Config::load(&given).unwrap_err().to_string();
        assert!(error.contains("x.toml"), "{error}");
        std::fs::write(dir.path().join("x.toml"), "").unwrap();
        assert_eq!(Config::load(&given).unwrap().files.len(), 1);
        assert_eq!(
            Config::load(&Places::Given("/dev/null".into())).unwrap().values,
            Values::default()
        );
    }
}
