//! What runs the guests on this host, why, and by whose settings.

use mvm_sandbox::engine::{self, Guest, Probe, Verdict as Usable, foresee};
use mvm_sandbox::layout::Layout;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Check, Verdict, good, not};
use crate::settings::{Config, Origin, Places, Settings};

/// Said until somebody has run the tests of the kvm engine on a host with VT-x or AMD-V.
const UNVERIFIED: &str = "not yet verified on hardware";

/// What was found about engines and settings.
pub struct Findings {
    probe: Probe,
    config: Result<(Config, Settings), String>,
}

/// What a guest would run on.
#[derive(Debug, Serialize)]
struct Outlook {
    engine: Option<&'static str>,
    fallback: bool,
    error: Option<String>,
}

impl Findings {
    /// Measures the host anew, and reads the settings.
    pub fn gather(layout: &Layout, places: &Places) -> Self {
        let config = || {
            let config = Config::load(places)?;
            let settings = Settings::without_flags(&config)?;
            anyhow::Ok((config, settings))
        };
        Self {
            probe: engine::probe_host_anew(layout).0,
            config: config().map_err(|e| format!("{e:#}")),
        }
    }

    /// The checks of `mvm doctor`.
    pub fn checks(&self) -> Vec<Check> {
        vec![self.engine(), self.kvm(), good("kvm engine", UNVERIFIED), self.settings()]
    }

    /// The same for programs, by the keys that docs/engines.md lists.
    pub fn json(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("kvm", json!(self.probe)),
            ("kvm_engine", json!({ "verified_on_hardware": false, "note": UNVERIFIED })),
            (
                "engine",
                json!({
                    "linux": self.outlook(Guest::Linux),
                    "unikernel": self.outlook(Guest::Unikernel),
                }),
            ),
            ("config", self.config_json()),
        ]
    }

    fn outlook(&self, guest: Guest) -> Option<Outlook> {
        let (_, settings) = self.config.as_ref().ok()?;
        Some(match foresee(&settings.wish(false), guest, &self.probe) {
            Ok(foreseen) => {
                Outlook { engine: Some(foreseen.engine), fallback: foreseen.fallback, error: None }
            }
            Err(e) => Outlook { engine: None, fallback: false, error: Some(e.to_string()) },
        })
    }

    /// What a run without flags takes.
    fn engine(&self) -> Check {
        let name = "engine";
        let Some(outlook) = self.outlook(Guest::Linux) else {
            return good(name, "unknown, since the settings cannot be read");
        };
        match (outlook.engine, outlook.fallback) {
            (Some("kvm"), _) => good(name, "kvm (hardware virtualization)"),
            (Some(_), true) => good(name, "emu (mvm's own emulation), in place of kvm: see below"),
            (Some(_), false) => good(name, "emu (mvm's own emulation), as the settings say"),
            (None, _) => not(
                name,
                Verdict::Bad,
                outlook.error.unwrap_or_default(),
                "change the setting, or name another engine by --engine",
            ),
        }
    }

    fn kvm(&self) -> Check {
        let finding = &self.probe.finding;
        let mut found = finding.text.clone();
        if !finding.detail.is_empty() {
            found.push_str(&format!(" ({})", finding.detail));
        }
        match self.probe.verdict {
            Usable::Usable => good("kvm", found),
            Usable::Interpreted | Usable::Unusable => {
                let remedy = format!("{}; or leave it: emu runs everything", finding.remedy);
                not("kvm", Verdict::Limited, found, remedy)
            }
        }
    }

    fn settings(&self) -> Check {
        let name = "settings";
        let (config, settings) = match &self.config {
            Ok(both) => both,
            Err(e) => return not(name, Verdict::Bad, e.clone(), "correct it"),
        };
        let read: Vec<String> =
            config.files.iter().filter(|f| f.1).map(|f| f.0.display().to_string()).collect();
        let mut text = if read.is_empty() {
            let places: Vec<_> = config.files.iter().map(|f| f.0.display().to_string()).collect();
            format!("defaults; there is no {}", places.join(" and no "))
        } else {
            read.join(", ")
        };
        for (key, value, origin) in settings.list() {
            if *origin != Origin::Default {
                text.push_str(&format!("\n{key} = {value} ({origin})"));
            }
        }
        good(name, text)
    }

    fn config_json(&self) -> Value {
        let (config, settings) = match &self.config {
            Ok(both) => both,
            Err(e) => return json!({ "files": [], "values": {}, "error": e }),
        };
        let files: Vec<Value> =
            config.files.iter().map(|(path, read)| json!({ "path": path, "read": read })).collect();
        let values: serde_json::Map<String, Value> = settings
            .list()
            .into_iter()
            .map(|(key, value, origin)| {
                (key.to_owned(), json!({ "value": value, "origin": origin.to_string() }))
            })
            .collect();
        json!({ "files": files, "values": values, "error": null })
    }
}
