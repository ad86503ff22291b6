//! Names from images in messages.

/// Longest name that a message repeats.
const SHOWN_MAX: usize = 200;

/// `name` as a message shows it: no control characters (a terminal would obey them), not too long.
pub(crate) fn show(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let mut shown = String::with_capacity(text.len().min(SHOWN_MAX) + 2);
    shown.push('`');
    for (count, c) in text.chars().enumerate() {
        if count == SHOWN_MAX {
            shown.push_str("...");
            break;
        }
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown.push('`');
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn show_escapes_and_shortens() {
        assert_eq!(show(b"a\x1b[2J\xff"), "`a\\u{1b}[2J\u{fffd}`");
        assert_eq!(show(&[b'x'; 500]).len(), SHOWN_MAX + 5);
    }
}
