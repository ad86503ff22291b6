//! Values of labels and annotations: plain or base64, checked before they are used.

/// Longest value in bytes.
const MAX_VALUE: usize = 4096;

/// Longest path in bytes, as Linux has it (`PATH_MAX` without the zero byte).
const MAX_PATH: usize = 4095;

/// Stands before base64 wherever a value may be plain.
const MARK: &str = "b64:";

/// How the values of one place are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As they are.
    Plain,
    /// In base64.
    Base64,
    /// Each in its own way: base64 if it is that, and a text if decoded.
    Either,
}

impl Encoding {
    /// The text of a value.
    pub(super) fn text(self, value: &str) -> Result<String, String> {
        if value.len() > MAX_VALUE {
            return Err(format!("{} bytes are too long, the limit is {MAX_VALUE}", value.len()));
        }
        // A value may say of itself that it is base64.
        let marked = value.strip_prefix(MARK);
        let text = match self {
            _ if marked.is_some() => marked.and_then(decode).ok_or("it is not base64 of a text")?,
            Self::Plain => value.to_owned(),
            Self::Base64 => decode(value).ok_or("it is not base64 of a text")?,
            Self::Either => decode(value).unwrap_or_else(|| value.to_owned()),
        };
        match text.chars().find(|c| c.is_control()) {
            Some(c) => Err(format!("there is a control character in it ({:#x})", u32::from(c))),
            None => Ok(text),
        }
    }
}

/// The text whose base64 (RFC 4648, section 4) `value` is; `None` if it is none, or of no text.
pub(super) fn decode(value: &str) -> Option<String> {
    let value = value.trim_end_matches(['\n', '\r']);
    if !value.len().is_multiple_of(4) {
        return None;
    }
    let digits = value.strip_suffix("==").or_else(|| value.strip_suffix('=')).unwrap_or(value);
    let (mut bits, mut have) = (0_u32, 0);
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for digit in digits.bytes() {
        let six = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have & 0xff) as u8);
            bits &= (1 << have) - 1;
        }
    }
    // Bits left over belong to nothing; with others than zero two texts would have one meaning.
    if bits != 0 || have >= 6 {
        return None;
    }
    let text = String::from_utf8(bytes).ok()?;
    (!text.chars().any(char::is_control)).then_some(text)
}

/// A path in the image: absolute, or from its root, printable, and without steps up.
pub(super) fn path(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("it is empty".into());
    }
    if text.len() > MAX_PATH {
        return Err(format!(
            "{} bytes are too long for a path, the limit is {MAX_PATH}",
            text.len()
        ));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("there is a control character in the path {text:?}"));
    }
    if text.split('/').any(|part| part == "..") {
        return Err(format!("the path {text:?} leads out of the image"));
    }
    Ok(match text.strip_prefix('/') {
        Some(_) => text.to_owned(),
        None => format!("/{text}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded_strictly() {
        for (value, text) in
            [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("dW5pa3JhZnQ=", "unikraft")]
        {
            assert_eq!(decode(value).as_deref(), Some(text));
        }
        // Wrong length, padding, alphabet, bits left over, no text, a control character.
        for value in
            ["Zg", "Zg=", "Z===", "Z-9v", "Zh==", "Zm9=", "//8=", "AAAA", "=Zm9", "Zg==Zg=="]
        {
            assert_eq!(decode(value), None, "{value}");
        }
    }

    #[test]
    fn values_are_bounded_and_have_no_controls() {
        assert!(Encoding::Plain.text(&"x".repeat(MAX_VALUE + 1)).unwrap_err().contains("4097"));
        assert!(Encoding::Plain.text("a\nb").unwrap_err().contains("0xa"));
        assert!(Encoding::Base64.text("a b").is_err());
        assert_eq!(Encoding::Either.text("a b").unwrap(), "a b");
        assert_eq!(Encoding::Either.text("YSBi").unwrap(), "a b");
        for encoding in [Encoding::Plain, Encoding::Base64, Encoding::Either] {
            assert_eq!(encoding.text("b64:YSBi").unwrap(), "a b");
            assert!(encoding.text("b64:a b").is_err());
        }
    }

    #[test]
    fn paths_stay_in_the_image() {
        assert_eq!(path("a/b").unwrap(), "/a/b");
        assert_eq!(path("/a..b").unwrap(), "/a..b");
        for bad in
            ["", "..", "/..", "/a/../../b", "../x", "/a\nb", "a\0", &"x".repeat(MAX_PATH + 1)]
        {
            assert!(path(bad).is_err(), "{bad}");
        }
    }
}
