//! Log lines whose parts programs can tell apart: `time="..." level=info msg="..." key=value ...`, which is how
//! containerd writes its own, so that one log has one form.
//!
//! What holds for all that a process says, such as whose machine it is, is said once to [`common`] and stands in every
//! line from then on.

use std::fmt::{self, Debug};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The field in which tracing keeps the message.
const MESSAGE: &str = "message";

static COMMON: Mutex<Vec<(&'static str, String)>> = Mutex::new(Vec::new());

fn fields() -> MutexGuard<'static, Vec<(&'static str, String)>> {
    COMMON.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has every line of this process say `key=value` from now on. Said again, the new value takes the place of the old one.
pub fn common(key: &'static str, value: &str) {
    let mut fields = fields();
    fields.retain(|(other, _)| *other != key);
    fields.push((key, value.to_owned()));
}

/// The form of a line.
#[derive(Debug, Clone, Copy, Default)]
pub struct Logfmt;

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let mut line = Line::default();
        event.record(&mut line);
        write!(writer, "time={time:?} level={level} msg={:?}", line.message)?;
        for (key, value) in &*fields() {
            pair(&mut writer, key, value)?;
        }
        for (key, value) in &line.rest {
            pair(&mut writer, key, value)?;
        }
        writeln!(writer)
    }
}

/// A value is quoted unless it is a plain word.
fn pair(writer: &mut Writer<'_>, key: &str, value: &str) -> fmt::Result {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._/@^+:".contains(&b);
    writer.write_char(' ')?;
    if !value.is_empty() && value.bytes().all(plain) {
        write!(writer, "{key}={value}")
    } else {
        write!(writer, "{key}={value:?}")
    }
}

/// What an event says.
#[derive(Debug, Default)]
struct Line {
    message: String,
    rest: Vec<(&'static str, String)>,
}

impl Line {
    fn take(&mut self, field: &Field, value: String) {
        match field.name() {
            MESSAGE => self.message = value,
            // The id of a process that has none is no news.
            _ if value.is_empty() => {}
            name => self.rest.push((name, value)),
        }
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.take(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_one_line_of_keys_and_values() {
        let paper = Paper::default();
        let sheet = paper.clone();
        let lines = tracing_subscriber::fmt()
            .event_format(Logfmt)
            .with_writer(move || sheet.clone())
            .finish();
        common("sandbox", "first");
        common("sandbox", "pod 1");
        tracing::subscriber::with_default(lines, || {
            tracing::info!(container = "c1", exec = "", signal = 9, "it \"says\"\nmuch");
            tracing::warn!("{} things", 2);
        });
        let text = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        let want = r#" level=info msg="it \"says\"\nmuch" sandbox="pod 1" container=c1 signal=9"#;
        assert!(lines[0].starts_with("time=\"2") && lines[0].ends_with(want), "{}", lines[0]);
        assert!(
            lines[1].ends_with(r#" level=warn msg="2 things" sandbox="pod 1""#),
            "{}",
            lines[1]
        );
    }
}
