//! The kernel command line.

use std::ffi::CString;

use linux_loader::cmdline::Cmdline;
use vm_memory::GuestAddress;

use super::Error;
use crate::config::CmdlineStyle;
use crate::layout;

/// What a Linux guest is told that is made for this machine.
///
/// * `reboot=k panic=-1`: a guest that ends or dies pulls the reset line at once.
/// * `mitigations=off`: one tenant per guest; the host protects itself.
/// * `tsc=reliable`: the counter is the host's, so neither watch it nor compare it between vCPUs.
/// * `rcupdate.rcu_expedited=1`: a grace period is a few interrupts instead of several ticks;
///   mounting, unmounting and namespaces wait for many.
/// * `8250.nr_uarts=1`: there is one.
const BASE: &str = "console=ttyS0 reboot=k panic=-1 mitigations=off tsc=reliable \
                    rcupdate.rcu_expedited=1 8250.nr_uarts=1";

/// What a guest is told besides whose memory can grow: that what is plugged is for movable pages, so that it can be given
/// back, up to three times as much as there is for the kernel's own.
const GROWS: &str = "memory_hotplug.online_policy=auto-movable";

/// What a kernel of anybody's is told: where its console is, and that a panic ends the machine
/// instead of spinning in it for ever.
const STOCK: &str = "console=ttyS0 panic=-1";

/// Ends the words for the kernel and begins those for the application.
const SEPARATOR: &str = "--";

/// What goes into a command line.
#[derive(Debug, Clone, Default)]
pub struct Parts<'a> {
    /// What there is besides the user's words.
    pub style: CmdlineStyle,
    /// Let a Linux kernel tell of its progress.
    pub verbose: bool,
    /// Some RAM lies above 4 GiB.
    pub high_memory: bool,
    /// More memory may be plugged.
    pub grows: bool,
    /// Number of virtio devices, at the first places of the layout.
    pub virtio_devices: u32,
    /// The user's own words.
    pub extra: &'a str,
}

/// Puts a command line together.
///
/// # Errors
/// [`Error::Cmdline`]: too long, or the user's part has characters that no command line can have.
pub fn build(parts: &Parts<'_>) -> Result<CString, Error> {
    match parts.style {
        CmdlineStyle::Auto | CmdlineStyle::Linux => linux(parts),
        CmdlineStyle::Stock => stock(parts),
        CmdlineStyle::Devices => {
            let devices = devices(parts)?;
            let devices = devices.to_str().unwrap_or_default();
            bare(parts, &insert_words(parts.extra, devices))
        }
        CmdlineStyle::Bare => bare(parts, parts.extra),
    }
}

/// The user's words come last, so that they win where Linux takes the last.
fn linux(parts: &Parts<'_>) -> Result<CString, Error> {
    let failed = |e| failed(parts, layout::LINUX_CMDLINE_MAX, &e);
    let mut line = Cmdline::new(layout::LINUX_CMDLINE_MAX).map_err(failed)?;
    line.insert_str(BASE).map_err(failed)?;
    if !parts.verbose {
        line.insert_str("quiet").map_err(failed)?;
    }
    if parts.high_memory {
        // No device is bound to the low 4 GiB: the kernel's 64 MiB bounce buffer would be wasted.
        line.insert_str("swiotlb=noforce").map_err(failed)?;
    }
    if parts.grows {
        line.insert_str(GROWS).map_err(failed)?;
    }
    add_devices(&mut line, parts).map_err(failed)?;
    end_with_the_users(line, parts)
}

fn stock(parts: &Parts<'_>) -> Result<CString, Error> {
    let failed = |e| failed(parts, layout::LINUX_CMDLINE_MAX, &e);
    let mut line = Cmdline::new(layout::LINUX_CMDLINE_MAX).map_err(failed)?;
    line.insert_str(STOCK).map_err(failed)?;
    if !parts.verbose {
        line.insert_str("quiet").map_err(failed)?;
    }
    end_with_the_users(line, parts)
}

fn end_with_the_users(mut line: Cmdline, parts: &Parts<'_>) -> Result<CString, Error> {
    let failed = |e| failed(parts, layout::LINUX_CMDLINE_MAX, &e);
    if !parts.extra.trim().is_empty() {
        line.insert_str(parts.extra.trim()).map_err(failed)?;
    }
    line.as_cstring().map_err(failed)
}

fn devices(parts: &Parts<'_>) -> Result<CString, Error> {
    let failed = |e| failed(parts, layout::CMDLINE_MAX, &e);
    let mut line = Cmdline::new(layout::CMDLINE_MAX).map_err(failed)?;
    add_devices(&mut line, parts).map_err(failed)?;
    line.as_cstring().map_err(failed)
}

fn add_devices(line: &mut Cmdline, parts: &Parts<'_>) -> linux_loader::cmdline::Result<()> {
    for index in 0..parts.virtio_devices {
        let at = GuestAddress(layout::virtio_mmio(index));
        line.add_virtio_mmio_device(layout::VIRTIO_MMIO_SIZE, at, layout::virtio_gsi(index), None)?;
    }
    Ok(())
}

/// Puts `words` before the first separator that is a word of its own and not in quotes, or at the end.
fn insert_words(line: &str, words: &str) -> String {
    let (before, after) = line.split_at(separator(line).unwrap_or(line.len()));
    let parts = [before.trim_end(), words, after];
    parts.iter().filter(|p| !p.is_empty()).copied().collect::<Vec<_>>().join(" ")
}

/// Where the separator is. A kind of quotes that is never closed is none.
fn separator(line: &str) -> Option<usize> {
    let is_gap = |c: Option<char>| c.is_none_or(|c| c.is_ascii_whitespace());
    let mut quoted_until = 0;
    for (at, c) in line.char_indices().filter(|(_, c)| matches!(c, '"' | '\'' | '-')) {
        if at < quoted_until {
            continue;
        }
        let (before, rest) = line.split_at(at);
        if let Some(after) = rest.strip_prefix(SEPARATOR) {
            let alone = is_gap(before.chars().next_back()) && is_gap(after.chars().next());
            if alone {
                return Some(at);
            }
        } else if c != '-'
            && let Some(len) = rest[1..].find(c)
        {
            quoted_until = at + 1 + len + 1;
        }
    }
    None
}

/// `line` as it is: whatever a C string can hold, the encoding is the application's affair.
fn bare(parts: &Parts<'_>, line: &str) -> Result<CString, Error> {
    if line.len() >= layout::CMDLINE_MAX {
        return Err(failed(parts, layout::CMDLINE_MAX, &"it is too long"));
    }
    CString::new(line).map_err(|e| failed(parts, layout::CMDLINE_MAX, &e))
}

fn failed(parts: &Parts<'_>, max: usize, reason: &dyn std::fmt::Display) -> Error {
    Error::Cmdline { reason: reason.to_string(), extra: parts.extra.len(), max: max - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(parts: &Parts<'_>) -> String {
        build(parts).unwrap().into_string().unwrap()
    }

    #[test]
    fn devices_and_the_users_words_follow_the_base() {
        let line = text(&Parts { virtio_devices: 2, extra: "loglevel=7 x=y", ..Parts::default() });
        assert!(line.starts_with("console=ttyS0 "), "{line}");
        assert!(line.contains(" quiet "), "{line}");
        assert!(
            line.ends_with(
                "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 \
                 loglevel=7 x=y"
            ),
            "{line}"
        );
    }

    #[test]
    fn what_cannot_be_a_command_line_is_refused() {
        use CmdlineStyle::{Bare, Devices, Linux, Stock};
        for style in [Linux, Stock, Devices, Bare] {
            let long = "x".repeat(layout::CMDLINE_MAX);
            let refused = build(&Parts { style, extra: &long, ..Parts::default() });
            assert!(matches!(refused, Err(Error::Cmdline { extra, .. }) if extra == long.len()));
            assert!(build(&Parts { style, extra: "a\0b", ..Parts::default() }).is_err());
        }
    }

    #[test]
    fn a_distributions_kernel_gets_no_word_about_devices() {
        let style = CmdlineStyle::Stock;
        let parts = Parts { style, virtio_devices: 9, high_memory: true, ..Parts::default() };
        assert_eq!(text(&parts), "console=ttyS0 panic=-1 quiet");
        let line = text(&Parts { extra: "root=/dev/vda", verbose: true, ..parts });
        assert_eq!(line, "console=ttyS0 panic=-1 root=/dev/vda");
    }

    #[test]
    fn all_devices_fit() {
        let parts = Parts {
            virtio_devices: layout::MAX_VIRTIO_DEVICES,
            high_memory: true,
            ..Parts::default()
        };
        assert!(build(&parts).unwrap().as_bytes().len() < layout::LINUX_CMDLINE_MAX - 512);
    }

    #[test]
    fn other_kernels_get_the_users_words_and_nothing_of_linux() {
        let line = |style, extra: &str| {
            text(&Parts { style, virtio_devices: 1, extra, ..Parts::default() })
        };
        for exact in ["", " --ipv4=10.0.0.2/24  \"two  gaps\" ", "ünïcode"] {
            assert_eq!(line(CmdlineStyle::Bare, exact), exact);
        }
        let device = "virtio_mmio.device=4K@0xd0000000:5";
        let with = |extra: &str| line(CmdlineStyle::Devices, extra);
        assert_eq!(with("app a=b -- x -- y"), format!("app a=b {device} -- x -- y"));
        assert_eq!(with("app --x=1"), format!("app --x=1 {device}"));
        assert_eq!(with("-- x"), format!("{device} -- x"));
        assert_eq!(with("app --"), format!("app {device} --"));
        assert_eq!(with(""), device);
        for quoted in ["app env.vars=[ \"A=x -- y\" 'B= -- ' ]", "it's one -quote"] {
            assert_eq!(with(&format!("{quoted} -- z -- ")), format!("{quoted} {device} -- z -- "));
        }
        assert_eq!(with("a \"b -- c"), format!("a \"b {device} -- c"));
        assert_eq!(with("a \"b -- c\""), format!("a \"b -- c\" {device}"));
    }
}
