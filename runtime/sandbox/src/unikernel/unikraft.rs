//! Images that kraft made: a platform of their own or not, kernel and initrd at fixed places, which
//! layer annotations may name.

use mvm_vmm::config::BootProtocol;

use super::value::{self, Encoding};
use super::{Error, Kind, Packaging, UnikernelPlan, Words};

const KERNEL: &str = "org.unikraft.kernel.image";
const INITRD: &str = "org.unikraft.kernel.initrd";

const DEFAULT_KERNEL: &str = "/unikraft/bin/kernel";
const DEFAULT_INITRD: &str = "/unikraft/bin/initrd";

pub(super) fn recognise(packaging: &Packaging<'_>) -> Result<Option<UnikernelPlan>, Error> {
    let named = annotated(packaging, KERNEL)?;
    if named.is_none() && !packaging.unikernel_platform {
        // One that was copied under the platform of ordinary images still has its place.
        if packaging.tree.head(DEFAULT_KERNEL, 0)?.is_none() {
            return Ok(None);
        }
    }
    let kernel = named.unwrap_or_else(|| DEFAULT_KERNEL.into());
    let initrd = match annotated(packaging, INITRD)? {
        Some(path) => Some(path),
        None => packaging.tree.head(DEFAULT_INITRD, 0)?.map(|_| DEFAULT_INITRD.to_owned()),
    };
    let words = packaging.command();
    packaging.mounts(Kind::Unikraft, 0)?;
    let cmdline = Words {
        kernel: &kernel,
        env: packaging.env,
        initrd: initrd.is_some(),
        kernel_args: packaging.kernel_args,
        args: &words,
        ..Words::default()
    };
    let cmdline = cmdline.cmdline(Kind::Unikraft)?;
    let (kind, boot) = (Kind::Unikraft, BootProtocol::Auto);
    let environment = kind.takes_environment();
    Ok(Some(UnikernelPlan {
        dialect: kind.into(),
        kernel,
        initrd,
        disk: None,
        boot,
        cmdline,
        left_out: Vec::new(),
        environment,
        words,
    }))
}

/// A path from the annotations; the uppermost layer's counts.
fn annotated(packaging: &Packaging<'_>, key: &str) -> Result<Option<String>, Error> {
    let layers = packaging.layers.iter().rev().copied();
    let Some(value) = layers.chain([packaging.manifest]).find_map(|pairs| pairs.get(key)) else {
        return Ok(None);
    };
    let bad = |reason| Error::Value { key: key.into(), place: "layer annotations", reason };
    let text = Encoding::Plain.text(value).map_err(bad)?;
    value::path(&text).map(Some).map_err(bad)
}
