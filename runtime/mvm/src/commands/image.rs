//! `mvm image`.

use anyhow::Context as _;
use mvm_image::{Image, ImageSummary, PruneOptions, Store};
use mvm_registry::PullOptions;
use mvm_sandbox::EXIT_FAILURE;
use mvm_sandbox::state::{human_duration, now_ms};

use super::Context;
use crate::cli::{Format, ImageCommand, Pull, PullArgs};
use crate::images;
use crate::interrupt::Interrupted;
use crate::output::{causes, complain, line, print, size, table};
use crate::progress::Bar;

pub fn image(context: &Context, command: &ImageCommand) -> anyhow::Result<i32> {
    let store = images::store(&context.layout)?;
    match command {
        ImageCommand::Import(args) => {
            let bar = Bar::new()?;
            let imported = store
                .import_path(&args.source, args.tag.as_deref(), &bar)
                .with_context(|| format!("cannot import {}", args.source.display()));
            tell(&bar.judge(imported)?)?;
        }
        ImageCommand::Pull(args) => return pull(context, args),
        ImageCommand::Ls(args) => list(&store, args.quiet, args.format)?,
        ImageCommand::Rm(args) => return remove(&store, &args.images, args.force),
        ImageCommand::Inspect { images } => {
            let all =
                images.iter().map(|name| store.inspect(name)).collect::<Result<Vec<_>, _>>()?;
            line(&serde_json::to_string_pretty(&all)?)?;
        }
        ImageCommand::Prune { all } => {
            let pruned = store.prune(PruneOptions { all: *all })?;
            for id in &pruned.images {
                line(&format!("deleted {id}"))?;
            }
            line(&format!("{} files removed, {} freed", pruned.files, size(pruned.freed)))?;
        }
        ImageCommand::BuildRootfs { image } => {
            let ready = images::ready(&store, image, Pull::Missing)?;
            line(&ready.rootfs.path().display().to_string())?;
        }
    }
    Ok(0)
}

/// `mvm pull`: one after the other; those that cannot be had do not keep the others away.
pub fn pull(context: &Context, args: &PullArgs) -> anyhow::Result<i32> {
    let store = images::store(&context.layout)?;
    let options = PullOptions { plain_http: args.plain_http };
    let mut code = 0;
    for name in &args.images {
        let bar = Bar::new()?;
        match bar.judge(images::pull(&store, name, options, &bar)) {
            Ok(images) => tell(&images)?,
            Err(error) if error.is::<Interrupted>() => return Err(error),
            Err(error) => {
                complain(&causes(&error));
                code = EXIT_FAILURE;
            }
        }
    }
    Ok(code)
}

/// What has come in, by its names.
fn tell(images: &[Image]) -> anyhow::Result<()> {
    for image in images {
        match image.names() {
            [] => line(&image.id().to_string())?,
            names => {
                for name in names {
                    line(&name.to_string())?;
                }
            }
        }
    }
    Ok(())
}

fn list(store: &Store, quiet: bool, format: Format) -> anyhow::Result<()> {
    let images = store.list()?;
    match (quiet, format) {
        (true, _) => {
            for image in &images {
                line(&image.id.to_string())?;
            }
        }
        (false, Format::Json) => {
            for image in &images {
                line(&serde_json::to_string(image)?)?;
            }
        }
        (false, Format::Table) => {
            let rows: Vec<Vec<String>> = images.iter().map(row).collect();
            print(&table(&["NAME", "IMAGE ID", "IMPORTED", "SIZE", "PLATFORM"], &rows))?;
        }
    }
    Ok(())
}

fn row(image: &ImageSummary) -> Vec<String> {
    let age = now_ms().saturating_sub(image.imported.saturating_mul(1000));
    let id = image.id.to_string();
    let short: String = id.strip_prefix("sha256:").unwrap_or(&id).chars().take(12).collect();
    vec![
        image.name.clone().unwrap_or_else(|| "<none>".into()),
        short,
        format!("{} ago", human_duration(age)),
        size(image.size),
        image.platform.clone(),
    ]
}

fn remove(store: &Store, names: &[String], force: bool) -> anyhow::Result<i32> {
    let mut code = 0;
    for name in names {
        match store.remove(name, force) {
            Ok(removed) => {
                for name in &removed.untagged {
                    line(&format!("untagged {name}"))?;
                }
                if let Some(id) = &removed.deleted {
                    line(&format!("deleted {id}"))?;
                }
            }
            Err(e) => {
                complain(&e.to_string());
                code = EXIT_FAILURE;
            }
        }
    }
    Ok(code)
}
