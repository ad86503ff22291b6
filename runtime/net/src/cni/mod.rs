//! Networks by CNI (Container Network Interface specification 1.0): a list of plugins, each a
//! program, which are run one after another in a namespace and make the interfaces in it.

mod config;
mod plugin;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use config::{Network, Places};
use plugin::{Call, Command};

/// The interface that the plugins make.
pub const INTERFACE: &str = "eth0";

/// Why a network by CNI is not there, or not gone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such network.
    #[error(
        "there is no network {name:?} in {}{}",
        config::list(directories),
        config::known(known)
    )]
    NoNetwork {
        /// Its name.
        name: String,
        /// Where it was looked for.
        directories: Vec<PathBuf>,
        /// Those that there are.
        known: Vec<String>,
    },
    /// A configuration cannot be used.
    #[error("the CNI configuration {} cannot be used: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// There is no such plugin.
    #[error(
        "there is no CNI plugin {name:?} in {}; Debian has the usual ones in the package \
         containernetworking-plugins",
        config::list(directories)
    )]
    NoPlugin {
        /// Its name.
        name: String,
        /// Where it was looked for.
        directories: Vec<PathBuf>,
    },
    /// A plugin could not be run.
    #[error("cannot run the CNI plugin {}: {source}", path.display())]
    Run {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A plugin failed.
    #[error("the CNI plugin {plugin} failed ({command}): {message}")]
    Failed {
        /// Its name.
        plugin: String,
        /// What was asked for.
        command: &'static str,
        /// Its words.
        message: String,
    },
    /// A plugin said something else than a result.
    #[error("the CNI plugin {plugin} answered with no result that could be used: {what}")]
    Answer {
        /// Its name.
        plugin: String,
        /// Why not.
        what: String,
    },
    /// Ports are to be published, and no plugin does that.
    #[error(
        "the network {0:?} publishes no ports: none of its plugins has the capability portMappings \
         (the plugin portmap has)"
    )]
    NoPorts(String),
}

/// A port of the host that leads to one of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// On the host.
    pub host_port: u16,
    /// In the guest.
    pub container_port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The host's address, or all of them if empty.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// What a plugin says of name servers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of servers.
    #[serde(default)]
    pub nameservers: Vec<String>,
    /// The domain of the machine.
    #[serde(default)]
    pub domain: Option<String>,
    /// Domains that are tried.
    #[serde(default)]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(default)]
    pub options: Vec<String>,
}

impl Dns {
    /// As `/etc/resolv.conf` has it. What could break a line is left out.
    pub fn resolv_conf(&self) -> String {
        let clean = |words: &[String]| -> Vec<String> {
            let fine = |w: &&String| !w.is_empty() && w.bytes().all(|b| b.is_ascii_graphic());
            words.iter().filter(fine).cloned().collect()
        };
        let mut text = String::new();
        for server in clean(&self.nameservers) {
            text.push_str(&format!("nameserver {server}\n"));
        }
        let domain: Vec<String> = self.domain.iter().cloned().collect();
        for (key, words) in
            [("domain", &domain), ("search", &self.search), ("options", &self.options)]
        {
            let words = clean(words);
            if !words.is_empty() {
                text.push_str(&format!("{key} {}\n", words.join(" ")));
            }
        }
        text
    }
}

/// A network that has been attached: all that is needed to take it away again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    network: Network,
    plugin_dirs: Vec<PathBuf>,
    container: String,
    namespace: PathBuf,
    ports: Vec<PortMapping>,
    /// What the last plugin said.
    result: Option<Value>,
}

impl Attachment {
    /// Prepares to attach the network `name` to the namespace for the machine `container`. Nothing is
    /// done yet, so that it can be written down first.
    ///
    /// # Errors
    /// There is no such network or plugin, or none that publishes ports.
    pub fn prepare(
        places: &Places,
        name: &str,
        container: &str,
        namespace: &Path,
        ports: Vec<PortMapping>,
    ) -> Result<Self, Error> {
        let network = Network::find(places, name)?;
        if !ports.is_empty() && !network.publishes_ports() {
            return Err(Error::NoPorts(name.into()));
        }
        for plugin in network.plugins() {
            places.plugin(plugin)?;
        }
        Ok(Self {
            network,
            plugin_dirs: places.plugin_dirs.clone(),
            container: container.into(),
            namespace: namespace.to_owned(),
            ports,
            result: None,
        })
    }

    /// Runs the plugins. If one fails, those that have run are undone.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add(&mut self) -> Result<(), Error> {
        for index in 0..self.network.len() {
            match self.call(Command::Add, index) {
                Ok(result) => self.result = Some(result),
                Err(error) => {
                    if let Err(e) = self.delete() {
                        tracing::warn!("after a failed CNI ADD: {e}");
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Asks the plugins whether all is as they made it.
    ///
    /// # Errors
    /// [`Error`].
    pub fn check(&self) -> Result<(), Error> {
        (0..self.network.len()).try_for_each(|index| self.call(Command::Check, index).map(drop))
    }

    /// Has the plugins undo what they did, the last one first; all of them, even if one fails.
    ///
    /// # Errors
    /// The first.
    pub fn delete(&self) -> Result<(), Error> {
        let mut first = Ok(());
        for index in (0..self.network.len()).rev() {
            let done = self.call(Command::Delete, index).map(drop);
            if first.is_ok() {
                first = done;
            }
        }
        first
    }

    /// What the plugins say of name servers.
    pub fn dns(&self) -> Option<Dns> {
        let dns = self.result.as_ref()?.get("dns")?;
        serde_json::from_value(dns.clone()).ok()
    }

    fn call(&self, command: Command, index: usize) -> Result<Value, Error> {
        let runtime = json!({ "portMappings": self.ports });
        let call = Call {
            command,
            container: &self.container,
            namespace: &self.namespace,
            interface: INTERFACE,
            directories: &self.plugin_dirs,
            plugin: self.network.plugin_type(index),
            config: self.network.plugin_config(index, &runtime, self.result.as_ref()),
        };
        call.run()
    }
}
