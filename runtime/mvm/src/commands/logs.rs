//! `mvm logs`.

use std::io::{self, Write};
use std::os::fd::AsFd;

use anyhow::Context as _;
use mvm_sandbox::ending::{Waited, Waiter};
use mvm_sandbox::logfile::{LogReader, Record, Source};
use mvm_sandbox::machine::CONSOLE_LOG;
use mvm_sandbox::ops::{self, Found};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::Context;
use crate::cli::LogsArgs;
use crate::output::print;

pub fn logs(context: &Context, args: &LogsArgs) -> anyhow::Result<()> {
    let found = ops::find(&context.registry()?, &args.container)?;
    if args.console {
        let path = found.place.logs.join(CONSOLE_LOG);
        let bytes = std::fs::read(&path)
            .with_context(|| format!("cannot read the console's log {}", path.display()))?;
        return print(&printable(&bytes));
    }
    let mut reader = LogReader::open(&found.place.logs).context("cannot read the log")?;
    if args.follow && found.state.is_live() {
        return follow(&found, &mut reader, args.timestamps);
    }
    show(&mut reader, args.timestamps)
}

/// The console is the guest's word: it may not drive the user's terminal.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
        .collect()
}

fn follow(found: &Found, reader: &mut LogReader, timestamps: bool) -> anyhow::Result<()> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .context("cannot watch the log")?;
    let changes = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
    watch.add_watch(reader.dir(), changes).context("cannot watch the log")?;
    let mut waiter = Waiter::new(&found.place.dir, found.state.owner)
        .context("cannot wait for the container")?;
    loop {
        // Watched before it is read, so that nothing is missed between the two.
        show(reader, timestamps)?;
        match waiter.wait_or(None, Some(watch.as_fd())).context("cannot wait for the container")? {
            Waited::Other => match watch.read_events() {
                Ok(_) | Err(nix::errno::Errno::EAGAIN) => {}
                Err(e) => return Err(e).context("cannot watch the log"),
            },
            // All is written before the end is told.
            Waited::Ended(_) | Waited::OwnerGone | Waited::Timeout => {
                return show(reader, timestamps);
            }
        }
    }
}

fn show(reader: &mut LogReader, timestamps: bool) -> anyhow::Result<()> {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    while let Some(record) = reader.next_record().context("cannot read the log")? {
        let text = if timestamps { stamped(&record) } else { record.data };
        match record.source {
            Source::Stdout => out.write_all(&text)?,
            Source::Stderr => err.write_all(&text)?,
        }
    }
    out.flush()?;
    Ok(())
}

fn stamped(record: &Record) -> Vec<u8> {
    let mut text = format!("{} ", rfc3339(record.time)).into_bytes();
    text.extend_from_slice(&record.data);
    text
}

/// Milliseconds since 1970 as `2026-01-02T03:04:05.678Z` (days to dates after Howard Hinnant's
/// `civil_from_days`).
fn rfc3339(millis: u64) -> String {
    let (seconds, ms) = (millis / 1000, millis % 1000);
    let (days, in_day) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (in_day / 3_600, in_day / 60 % 60, in_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(rfc3339(1_767_323_045_678), "2026-01-02T03:04:05.678Z");
    }

    #[test]
    fn console_cannot_drive_the_terminal() {
        assert_eq!(printable(b"a\x1b[2Jb\r\n\tc\x07"), "a[2Jb\n\tc");
    }
}
