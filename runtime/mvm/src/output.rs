//! Speaking to people: standard output that may be closed, and one-line complaints.

use std::io::{self, Write};

/// Exit code when the reader of our output went away: that of a process killed by SIGPIPE.
pub const EXIT_CLOSED: i32 = 141;

/// Writes to standard output.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes a line to standard output.
pub fn line(text: &str) -> anyhow::Result<()> {
    print(&format!("{text}\n"))
}

/// Tells on standard error what went wrong.
pub fn complain(text: &str) {
    let mut line = format!("mvm: {text}\n");
    if crate::terminal::is_raw() {
        line = line.replace('\n', "\r\n");
    }
    // In one write, so that the complaints of several processes do not mix.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// An error and what it comes from, in one line. What is said already is not said again.
pub fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whether an error only says that nobody reads our output any more.
pub fn is_closed(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// A table with docker's look: no lines, columns two or more blanks apart.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut push = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            line.push_str(&format!("{cell:width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    push(&mut header.iter().copied());
    for row in rows {
        push(&mut row.iter().map(String::as_str));
    }
    text
}

/// Bytes for people: `1.5MiB`.
pub fn size(bytes: u64) -> String {
    let mut unit = "B";
    // For showing three digits of it.
    #[allow(clippy::cast_precision_loss)]
    let mut value = bytes as f64;
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" || value >= 100.0 {
        format!("{value:.0}{unit}")
    } else {
        format!("{value:.1}{unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let source = || io::Error::other("no room");
        let told = |error: anyhow::Error| causes(&error);
        let file = mvm_sandbox::state::Error::Io { path: "/a".into(), source: source() };
        assert_eq!(told(file.into()), "/a: no room");
        assert_eq!(
            told(anyhow::Error::from(source()).context("cannot write")),
            "cannot write: no room"
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "b".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(table(&["X", "YY"], &rows), "X     YY\na     b\nccc   d\n");
    }

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1536, "1.5KiB"),
            (512 << 20, "512MiB"),
            (3 << 29, "1.5GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
