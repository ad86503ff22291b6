//! A file-system tree in memory: what layers and directories become before they are an image.
//!
//! Only metadata lives here. File contents are already in the image that is being written, and a
//! node remembers where ([`Content`]). So owners, devices and extended attributes survive without
//! any privilege on the host, and memory is bounded by the number of entries.

use std::collections::BTreeMap;

use crate::erofs::Content;

/// Index of a node in its [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct NodeId(u32);

impl NodeId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Seconds since 1970 and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Meta {
    /// Permission bits, 0o7777 at most.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Full name (`user.comment`) to value.
    pub(crate) xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

impl Meta {
    /// Of a directory that nobody described.
    pub(crate) fn implied_directory(mtime: Time) -> Self {
        Self { mode: 0o755, mtime, ..Self::default() }
    }
}

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum Kind {
    File(Content),
    Directory(Children),
    Symlink(Box<[u8]>),
    Character(Device),
    Block(Device),
    Fifo,
    Socket,
}

/// The names in a directory, in byte order, as EROFS wants them.
pub(crate) type Children = BTreeMap<Box<[u8]>, Child>;

/// A directory entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Child {
    pub(crate) node: NodeId,
    /// The last layer that added the entry or something below it. Whiteouts of a layer hide only
    /// what older layers brought.
    pub(crate) layer: u32,
}

/// An inode.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// A tree of nodes. Nodes that no entry refers to any more stay allocated but are not written.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A tree with nothing but an implied root directory.
    pub(crate) fn new() -> Self {
        let meta = Meta::implied_directory(Time::default());
        Self { nodes: vec![Node { meta, kind: Kind::Directory(Children::new()) }] }
    }

    pub(crate) const ROOT: NodeId = NodeId(0);

    /// Adds a node that no directory refers to yet. `None` if there are 2^32 already.
    pub(crate) fn add(&mut self, meta: Meta, kind: Kind) -> Option<NodeId> {
        let id = NodeId(u32::try_from(self.nodes.len()).ok()?);
        self.nodes.push(Node { meta, kind });
        Some(id)
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// Nodes allocated, written or not.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// The entries of `id`, if it is a directory.
    pub(crate) fn children(&self, id: NodeId) -> Option<&Children> {
        match &self.node(id).kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// As [`Tree::children`].
    pub(crate) fn children_mut(&mut self, id: NodeId) -> Option<&mut Children> {
        match &mut self.node_mut(id).kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    pub(crate) fn child(&self, directory: NodeId, name: &[u8]) -> Option<Child> {
        self.children(directory)?.get(name).copied()
    }

    /// Makes `name` in `directory` refer to `node`, whatever it referred to before.
    pub(crate) fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId, layer: u32) {
        if let Some(children) = self.children_mut(directory) {
            children.insert(name.into(), Child { node, layer });
        }
    }

    /// Hides what layers below `layer` brought under `name` in `directory`.
    pub(crate) fn hide(&mut self, directory: NodeId, name: &[u8], layer: u32) {
        match self.child(directory, name) {
            None => {}
            Some(child) if child.layer < layer => {
                if let Some(children) = self.children_mut(directory) {
                    children.remove(name);
                }
            }
            Some(child) => self.hide_children(child.node, layer),
        }
    }

    /// Hides everything in `directory` that layers below `layer` brought.
    pub(crate) fn hide_children(&mut self, directory: NodeId, layer: u32) {
        let mut open = vec![directory];
        while let Some(directory) = open.pop() {
            if let Some(children) = self.children_mut(directory) {
                children.retain(|_, child| child.layer >= layer);
                open.extend(children.values().map(|child| child.node));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(tree: &mut Tree, parent: NodeId, name: &[u8], layer: u32) -> NodeId {
        let node = tree.add(Meta::default(), Kind::Directory(Children::new())).unwrap();
        tree.link(parent, name, node, layer);
        node
    }

    #[test]
    fn hide_of_older_entry_removes_it() {
        let mut tree = Tree::new();
        directory(&mut tree, Tree::ROOT, b"a", 0);
        tree.hide(Tree::ROOT, b"a", 1);
        assert!(tree.child(Tree::ROOT, b"a").is_none());
        tree.hide(Tree::ROOT, b"missing", 1);
    }

    #[test]
    fn hide_of_own_entry_keeps_it_without_older_children() {
        let mut tree = Tree::new();
        let a = directory(&mut tree, Tree::ROOT, b"a", 1);
        directory(&mut tree, a, b"old", 0);
        let new = directory(&mut tree, a, b"new", 1);
        directory(&mut tree, new, b"older", 0);
        tree.hide(Tree::ROOT, b"a", 1);
        assert!(tree.child(a, b"old").is_none());
        assert!(tree.child(a, b"new").is_some());
        assert!(tree.child(new, b"older").is_none());
    }
}
