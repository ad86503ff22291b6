//! What is said to the file server by whoever owns the sandbox.
//!
//! * The **owner channel** is the server's standard input: one [`Setup`] with descriptors goes down, one
//!   [`Report`] comes up.
//! * The **share socket** takes an [`Ask`] a packet and answers each with an [`Answer`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::confine::Layer;
use crate::tree::Tree;

/// Longest name of a share in bytes.
pub const MAX_NAME: usize = 128;

/// How far the guest may trust what it has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// The host changes the tree too: names and attributes are looked at again after a second, content
    /// when a file is opened.
    #[default]
    Live,
    /// Nobody but the guest changes it: what was seen once holds.
    Exclusive,
}

/// How a tree is shared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareOptions {
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest may keep.
    pub cache: Cache,
}

/// What is shared.
#[derive(Debug)]
pub enum Source {
    /// A directory or file, opened by the server in namespaces of its own.
    Path(PathBuf),
    /// A directory, best one that [`tree::detach`](crate::tree::detach) or
    /// [`follow`](crate::follow::follow) has made.
    Tree(Tree),
}

/// A share to be made.
#[derive(Debug)]
pub struct NewShare {
    /// Its name in the root directory, see [`check_name`].
    pub name: String,
    /// What is shared.
    pub source: Source,
    /// How.
    pub options: ShareOptions,
}

/// Whether `name` can be that of a share: 1 to [`MAX_NAME`] of `A-Z a-z 0-9 _ . -`, no dot in front.
pub fn check_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// The owner's one message. Its descriptors are the channel to the device, the share socket, and the
/// trees of those shares that have no path.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// Name of the sandbox, for logs.
    pub id: String,
    /// The first shares.
    pub shares: Vec<First>,
}

/// A share in the [`Setup`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct First {
    pub name: String,
    pub options: ShareOptions,
    /// Bytes of the path; `None` if descriptors come with the message.
    pub path: Option<Vec<u8>>,
    /// How many descriptors come after that of the tree, to be kept open.
    pub keep: usize,
}

/// The server's answer to its owner.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "report")]
pub(crate) enum Report {
    /// It serves.
    Ready {
        /// What confines it.
        layers: Vec<Layer>,
    },
    /// It does not.
    Failed {
        /// What happened, where, what to do.
        message: String,
    },
}

/// What can be asked over the share socket.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "ask")]
pub(crate) enum Ask {
    /// Shares the tree whose descriptor comes along, and keeps further ones open.
    Add { name: String, options: ShareOptions },
    /// Ends a share.
    Remove { name: String },
    /// Names all shares.
    List,
}

/// The answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub(crate) enum Answer {
    Done,
    Names { names: Vec<String> },
    Error { message: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_single_plain_components() {
        for good in ["a", "ctr1-root", "v0", "a.b_C"] {
            assert!(check_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "ü", &"x".repeat(MAX_NAME + 1)] {
            assert!(!check_name(bad), "{bad}");
        }
    }
}
