//! Images of Hermit: nothing says so but the program, an ELF file for the system 255, and the loader
//! beside it, which takes the program as its initrd.

use mvm_vmm::config::BootProtocol;

use super::value;
use super::{Error, Kind, Packaging, UnikernelPlan, Words};

const LOADER: &str = "hermit-loader";

/// First bytes of an ELF file up to EI_OSABI (System V ABI, chapter 4).
const ELF_MAGIC: &[u8] = b"\x7fELF";
const EI_OSABI: usize = 7;
/// Stand-alone: an application without a system of its own.
const STANDALONE: u8 = 255;

pub(super) fn recognise(packaging: &Packaging<'_>) -> Result<Option<UnikernelPlan>, Error> {
    let command = packaging.command();
    let Some((program, words)) = command.split_first() else { return Ok(None) };
    // A program that is looked for in PATH, or a strange one, is no business of ours.
    let Some(path) = value::path(program).ok().filter(|_| program.starts_with('/')) else {
        return Ok(None);
    };
    let head = packaging.tree.head(&path, EI_OSABI + 1)?.unwrap_or_default();
    if !head.starts_with(ELF_MAGIC) || head.get(EI_OSABI) != Some(&STANDALONE) {
        return Ok(None);
    }
    let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
    let kernel = format!("{dir}/{LOADER}");
    if packaging.tree.head(&kernel, 0)?.is_none() {
        let reason = format!("is a Hermit application, but there is no {LOADER} beside it");
        return Err(Error::File { path, reason });
    }
    packaging.mounts(Kind::Hermit, 0)?;
    let cmdline = Words { kernel_args: packaging.kernel_args, args: words, ..Words::default() };
    let cmdline = cmdline.cmdline(Kind::Hermit)?;
    Ok(Some(UnikernelPlan {
        dialect: Kind::Hermit.into(),
        kernel,
        initrd: Some(path),
        disk: None,
        boot: BootProtocol::Auto,
        cmdline,
        left_out: Vec::new(),
        environment: Kind::Hermit.takes_environment(),
        words: words.to_vec(),
    }))
}
