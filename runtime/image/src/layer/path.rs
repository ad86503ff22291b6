//! Paths of entries: their components, and where they lead in a tree.

use std::collections::VecDeque;

use thiserror::Error;

use crate::erofs::NAME_MAX;
use crate::names::show;
use crate::tree::{Children, Kind, Meta, NodeId, Time, Tree};

/// Bytes of a path (`PATH_MAX`).
const PATH_MAX: usize = 4096;
/// Symbolic links followed on the way to one entry, as many as Linux follows.
const LINKS_MAX: usize = 40;

/// Why a path is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PathError {
    /// `..` leads out of the root, or into it from elsewhere.
    #[error("the path contains `..`")]
    Parent,
    /// A link target from the root of some file system.
    #[error("the path is absolute")]
    Absolute,
    /// No file name has a NUL.
    #[error("the path contains a NUL")]
    Nul,
    /// Longer than Linux allows.
    #[error("the path has {0} bytes, the maximum is 4096")]
    Long(usize),
    /// Longer than Linux allows.
    #[error("a name in the path has {0} bytes, the maximum is 255")]
    LongName(usize),
    /// Deeper than allowed.
    #[error("the path is more than {0} directories deep")]
    Deep(usize),
    /// Something on the way is not a directory.
    #[error("{0} is not a directory")]
    NotDirectory(String),
    /// Links on the way lead to links on the way.
    #[error("too many symbolic links on the way")]
    Links,
}

/// Why directories on the way to an entry were not created.
#[derive(Debug)]
pub(super) enum CreateError {
    Path(PathError),
    /// No more nodes.
    Full,
}

impl From<PathError> for CreateError {
    fn from(error: PathError) -> Self {
        Self::Path(error)
    }
}

/// The names in `path`. A leading slash means the root, as with Docker; so does an empty path.
pub(super) fn components(path: &[u8], depth: usize) -> Result<Vec<&[u8]>, PathError> {
    if path.len() > PATH_MAX {
        return Err(PathError::Long(path.len()));
    }
    if path.contains(&0) {
        return Err(PathError::Nul);
    }
    let mut components = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(PathError::Parent),
            name if name.len() > NAME_MAX => return Err(PathError::LongName(name.len())),
            name => components.push(name),
        }
    }
    if components.len() > depth {
        return Err(PathError::Deep(depth));
    }
    Ok(components)
}

/// What a walk does when a name is missing.
trait Missing {
    type Error: From<PathError>;
    fn tree(&self) -> &Tree;
    /// The new directory `name` in `parent`, which is `depth` directories deep; `None` to stop there.
    fn missing(
        &mut self,
        parent: NodeId,
        name: &[u8],
        depth: usize,
    ) -> Result<Option<NodeId>, Self::Error>;
    /// The walk passes through `name` in `parent`.
    fn passed(&mut self, parent: NodeId, name: &[u8], node: NodeId);
}

/// Walks through directories, following symbolic links as if the tree were the whole file system.
fn walk<W: Missing>(way: &mut W, components: &[&[u8]]) -> Result<Option<NodeId>, W::Error> {
    let mut chain = vec![Tree::ROOT];
    let mut todo: VecDeque<Vec<u8>> = VecDeque::new();
    let mut rest = components.iter();
    let mut links = 0;
    loop {
        let owned = todo.pop_front();
        let name: &[u8] = match &owned {
            Some(name) => name,
            None => match rest.next() {
                Some(name) => name,
                None => break,
            },
        };
        if name == b".." {
            if chain.len() > 1 {
                chain.pop();
            }
            continue;
        }
        let parent = chain.last().copied().unwrap_or(Tree::ROOT);
        let Some(child) = way.tree().child(parent, name) else {
            match way.missing(parent, name, chain.len())? {
                Some(node) => chain.push(node),
                None => return Ok(None),
            }
            continue;
        };
        match &way.tree().node(child.node).kind {
            Kind::Directory(_) => {
                way.passed(parent, name, child.node);
                chain.push(child.node);
            }
            Kind::Symlink(target) => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(PathError::Links.into());
                }
                if target.starts_with(b"/") {
                    chain.truncate(1);
                }
                let names = target
                    .split(|byte| *byte == b'/')
                    .filter(|name| !name.is_empty() && *name != b".");
                for name in names.rev() {
                    if name.len() > NAME_MAX {
                        return Err(PathError::LongName(name.len()).into());
                    }
                    todo.push_front(name.to_vec());
                }
            }
            _ => return Err(PathError::NotDirectory(show(name)).into()),
        }
    }
    Ok(chain.pop())
}

/// Creates what is missing, and marks what it passes as part of the layer.
struct Create<'a> {
    tree: &'a mut Tree,
    depth: usize,
    mtime: Time,
    layer: u32,
}

impl Missing for Create<'_> {
    type Error = CreateError;

    fn tree(&self) -> &Tree {
        self.tree
    }

    fn missing(
        &mut self,
        parent: NodeId,
        name: &[u8],
        depth: usize,
    ) -> Result<Option<NodeId>, CreateError> {
        if depth > self.depth {
            return Err(PathError::Deep(self.depth).into());
        }
        let meta = Meta::implied_directory(self.mtime);
        let node =
            self.tree.add(meta, Kind::Directory(Children::new())).ok_or(CreateError::Full)?;
        self.tree.link(parent, name, node, self.layer);
        Ok(Some(node))
    }

    fn passed(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        self.tree.link(parent, name, node, self.layer);
    }
}

/// Only looks.
struct Look<'a>(&'a Tree);

impl Missing for Look<'_> {
    type Error = PathError;

    fn tree(&self) -> &Tree {
        self.0
    }

    fn missing(&mut self, _: NodeId, _: &[u8], _: usize) -> Result<Option<NodeId>, PathError> {
        Ok(None)
    }

    fn passed(&mut self, _: NodeId, _: &[u8], _: NodeId) {}
}

/// The directory that `components` lead to, created with all above it where it is missing.
pub(super) fn create(
    tree: &mut Tree,
    components: &[&[u8]],
    depth: usize,
    mtime: Time,
    layer: u32,
) -> Result<NodeId, CreateError> {
    let mut way = Create { tree, depth, mtime, layer };
    Ok(walk(&mut way, components)?.unwrap_or(Tree::ROOT))
}

/// The directory that `components` lead to.
pub(super) fn find_directory(
    tree: &Tree,
    components: &[&[u8]],
) -> Result<Option<NodeId>, PathError> {
    walk(&mut Look(tree), components)
}

/// What `components` lead to, without following a link at the very end.
pub(super) fn find(tree: &Tree, components: &[&[u8]]) -> Result<Option<NodeId>, PathError> {
    let Some((name, parents)) = components.split_last() else { return Ok(Some(Tree::ROOT)) };
    let parent = find_directory(tree, parents)?;
    Ok(parent.and_then(|parent| tree.child(parent, name)).map(|child| child.node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(tree: &mut Tree, name: &[u8], target: &[u8]) {
        let node = tree.add(Meta::default(), Kind::Symlink(target.into())).unwrap();
        tree.link(Tree::ROOT, name, node, 0);
    }

    #[test]
    fn components_are_relative_to_the_root() {
        assert_eq!(components(b"/usr/./bin//sh", 9).unwrap(), [b"usr".as_slice(), b"bin", b"sh"]);
        assert!(components(b"./", 9).unwrap().is_empty());
        assert!(components(b"", 9).unwrap().is_empty());
    }

    #[test]
    fn components_of_impossible_path_are_refused() {
        let long = [b'a'; 256];
        for (path, error) in [
            (&b"a/../../b"[..], PathError::Parent),
            (b"..", PathError::Parent),
            (b"a\0b", PathError::Nul),
            (&long, PathError::LongName(256)),
            (&[b'/'; 5000], PathError::Long(5000)),
            (b"a/b/c/d/e/f/g/h/i/j", PathError::Deep(9)),
        ] {
            assert_eq!(components(path, 9).unwrap_err(), error);
        }
    }

    #[test]
    fn create_follows_links_within_the_root() {
        let mut tree = Tree::new();
        link(&mut tree, b"lib", b"usr/lib");
        link(&mut tree, b"up", b"../../../up2");
        link(&mut tree, b"abs", b"/usr/lib");
        let lib = create(&mut tree, &[b"lib"], 9, Time::default(), 1).unwrap();
        assert_eq!(find(&tree, &[b"usr", b"lib"]).unwrap(), Some(lib));
        assert_eq!(create(&mut tree, &[b"abs"], 9, Time::default(), 1).unwrap(), lib);
        let up = create(&mut tree, &[b"up", b"x"], 9, Time::default(), 1).unwrap();
        assert_eq!(find(&tree, &[b"up2", b"x"]).unwrap(), Some(up));
    }

    #[test]
    fn create_through_link_loop_ends() {
        let mut tree = Tree::new();
        link(&mut tree, b"a", b"b");
        link(&mut tree, b"b", b"a/a/a");
        let error = create(&mut tree, &[b"a"], 9, Time::default(), 1).unwrap_err();
        assert!(matches!(error, CreateError::Path(PathError::Links)));
    }

    #[test]
    fn create_below_a_file_is_refused() {
        let mut tree = Tree::new();
        let node = tree.add(Meta::default(), Kind::Fifo).unwrap();
        tree.link(Tree::ROOT, b"f", node, 0);
        let error = create(&mut tree, &[b"f", b"x"], 9, Time::default(), 1).unwrap_err();
        assert!(matches!(error, CreateError::Path(PathError::NotDirectory(name)) if name == "`f`"));
    }
}
