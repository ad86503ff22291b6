//! Finding the image that the user means: by name in the store or a registry, or a path that
//! is imported first.

use std::path::Path;

use anyhow::{Context, bail};
use mvm_image::{Image, ImageSource, Reference, RootfsLease, Store, StoreError};
use mvm_registry::PullOptions;
use mvm_sandbox::layout::Layout;

use crate::cli::Pull;
use crate::output::causes;
use crate::progress::Bar;

/// The store of this layout.
pub fn store(layout: &Layout) -> anyhow::Result<Store> {
    Store::open(layout.images()).context("cannot open the image store")
}

/// An image that is ready to run.
#[derive(Debug)]
pub struct Ready {
    /// What the image says of itself.
    pub image: Image,
    /// Its root file system, kept in the store while this or a duplicate is open.
    pub rootfs: RootfsLease,
}

/// Finds `name`, importing it first if it is a path, and pulling it if `policy` says so.
pub fn ready(store: &Store, name: &str, policy: Pull) -> anyhow::Result<Ready> {
    let bar = Bar::new()?;
    bar.judge(prepare(store, name, policy, &bar))
}

/// Pulls `name` from its registry.
pub fn pull(
    store: &Store,
    name: &str,
    options: PullOptions,
    bar: &Bar,
) -> anyhow::Result<Vec<Image>> {
    let reference: Reference = name.parse()?;
    mvm_registry::pull(store, &reference, options, bar)
        .with_context(|| format!("cannot pull {reference}"))
}

fn prepare(store: &Store, name: &str, policy: Pull, bar: &Bar) -> anyhow::Result<Ready> {
    let image = match policy {
        _ if is_path(name) => import(store, Path::new(name), bar)?,
        Pull::Never => store.resolve(name)?,
        Pull::Always => {
            pull(store, name, PullOptions::default(), bar)?;
            store.resolve(name)?
        }
        Pull::Missing => match store.resolve(name) {
            Err(missing @ StoreError::NotFound { .. }) if !name.starts_with("sha256:") => {
                if let Err(error) = pull(store, name, PullOptions::default(), bar) {
                    bail!("{}; {missing}", causes(&error));
                }
                store.resolve(name)?
            }
            found => found?,
        },
    };
    let platform = image.platform();
    if platform.rank().is_none() {
        bail!("image {name} is for {platform}; mvm runs images for linux/amd64");
    }
    let rootfs = store
        .rootfs(&image, bar)
        .with_context(|| format!("cannot prepare the root file system of image {name}"))?;
    Ok(Ready { image, rootfs })
}

/// A path is what looks like one and no image name, or what exists and holds an image.
fn is_path(name: &str) -> bool {
    let explicit = ["/", "./", "../"].iter().any(|start| name.starts_with(start));
    explicit || name == "." || name == ".." || ImageSource::detect(Path::new(name)).is_some()
}

fn import(store: &Store, path: &Path, bar: &Bar) -> anyhow::Result<Image> {
    if !path.exists() {
        bail!("{}: no such file or directory", path.display());
    }
    let mut images = store
        .import_path(path, None, bar)
        .with_context(|| format!("cannot import {}", path.display()))?;
    match (images.pop(), images.len()) {
        (Some(image), 0) => Ok(image),
        (None, _) => bail!("{} holds no image", path.display()),
        (Some(_), others) => bail!(
            "{path} holds {count} images; import it by `mvm image import {path}` and run one by name",
            path = path.display(),
            count = others + 1,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_told_apart() {
        for name in ["busybox", "busybox:1", "docker.io/library/busybox", "a/b"] {
            assert!(!is_path(name), "{name}");
        }
        for path in ["./busybox", "/srv/image.tar", "../x"] {
            assert!(is_path(path), "{path}");
        }
    }
}
