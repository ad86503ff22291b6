//! `mvm run` of an image that holds a unikernel: which one that is, and its files.

use anyhow::{Context as _, bail};
use mvm_sandbox::machine::Payload;
use mvm_sandbox::spec::{self, merge_variable};
use mvm_sandbox::timings::Timings;
use mvm_sandbox::unikernel::{self, ErofsTree, Files, Packaging, Recognised, UnikernelPlan};
use mvm_sandbox::{Disk, Error};

use super::Context;
use super::bare::{self, Load, Provenance};
use super::disk::{self, Asked};
use crate::cli::RunArgs;
use crate::images::Ready;
use crate::settings::Settings;

/// What an image says that it is, with what the user says added.
pub fn recognise(
    args: &RunArgs,
    options: &spec::Options,
    ready: &Ready,
) -> anyhow::Result<Recognised> {
    let image = ready.image.defaults();
    let layers: Vec<_> = ready.image.layers().iter().map(|layer| &layer.annotations).collect();
    let mut env = image.env;
    for variable in &options.env {
        merge_variable(&mut env, variable).map_err(Error::from)?;
    }
    let (entrypoint, cmd) = match options.entrypoint.as_deref() {
        None => (image.entrypoint, image.cmd),
        Some("") => (Vec::new(), Vec::new()),
        Some(program) => (vec![program.to_owned()], Vec::new()),
    };
    let tree = ErofsTree::open(ready.rootfs.file()).map_err(Error::from).with_context(|| {
        let name = args.image();
        format!("the root file system of image {name} in the store is damaged; `mvm image rm {name}`, and get it again")
    })?;
    let packaging = Packaging {
        annotations: &options.annotations,
        manifest: ready.image.annotations(),
        layers: &layers,
        labels: &image.labels,
        env: &env,
        entrypoint: &entrypoint,
        cmd: &cmd,
        args: &options.command,
        kernel_args: args.cmdline.as_deref().unwrap_or_default(),
        disks: &disk::mount_points(&disk::read(&args.disk)?),
        unikernel_platform: ready.image.platform().is_unikernel(),
        tree: &tree,
    };
    let recognised = unikernel::recognise(&packaging).map_err(Error::from);
    recognised.with_context(|| format!("cannot run image {}", args.image()))
}

/// Runs the unikernel in an image and returns the exit code for the user.
pub fn run(
    context: &Context,
    args: &RunArgs,
    settings: &Settings,
    ready: &Ready,
    plan: UnikernelPlan,
    timings: &mut Timings,
) -> anyhow::Result<i32> {
    bare::refuse_what_does_not_hold(args, plan.kind(), Provenance::Image)?;
    let given = !args.env.is_empty() || !args.env_file.is_empty();
    if given && !plan.environment {
        bail!("--env cannot hold for this kind of unikernel: it has no environment");
    }
    if args.kernel.is_some() || !args.initrd.is_empty() {
        bail!("--kernel and --initrd cannot hold: image {} has a kernel of its own", args.image());
    }
    let tree = ErofsTree::open(ready.rootfs.file()).map_err(Error::from)?;
    let files = Files::extract(&plan, &tree, &context.layout.logs()).map_err(Error::from);
    let Files { kernel, initrd, disk } =
        files.with_context(|| format!("cannot run image {}", args.image()))?;
    let mut dialect = plan.dialect;
    dialect.look_into(&kernel).context("cannot read the kernel")?;
    let own = disk.into_iter().map(|file| Ok(Disk { file, read_only: false }));
    let asked = disk::read(&args.disk)?;
    let disks = own.chain(asked.iter().map(Asked::open)).collect::<anyhow::Result<_>>()?;
    let load = Load {
        dialect,
        kernel: Payload::file(kernel),
        initrd: initrd.map(Payload::file),
        modules: Vec::new(),
        disks,
        boot: plan.boot,
        cmdline: plan.cmdline,
        left_out: plan.left_out,
        command: plan.words,
        image: args.image().to_owned(),
        image_digest: ready.image.manifest().to_string(),
        labels: ready.image.defaults().labels,
    };
    bare::launch(context, args, settings, load, timings)
}
