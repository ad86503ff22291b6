//! Diagnostics on standard error.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Warnings only, everything of ours with `--debug`, and what `MVM_LOG` (`info`, `mvm_image=debug,warn`)
/// says instead of both.
pub fn init(debug: bool) {
    let default = Targets::new().with_default(LevelFilter::WARN).with_targets(
        ["mvm", "mvm_sandbox", "mvm_image"]
            .into_iter()
            .filter(|_| debug)
            .map(|t| (t, LevelFilter::DEBUG)),
    );
    let chosen = std::env::var("MVM_LOG").ok().and_then(|text| text.parse().ok());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(debug)
        .without_time();
    tracing_subscriber::registry().with(lines).with(chosen.unwrap_or(default)).init();
}
