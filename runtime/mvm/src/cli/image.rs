//! `mvm image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Format;

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Import an image from an OCI layout directory, an OCI archive or a `docker save` archive
    Import(ImportArgs),
    /// Pull images from registries
    Pull(PullArgs),
    /// List images
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove images
    Rm(RmImageArgs),
    /// Show all that is known of an image, as JSON
    Inspect {
        /// Reference or digest
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove what no image needs, and images without a name
    Prune {
        /// Remove all images that no running container uses
        #[arg(short, long)]
        all: bool,
    },
    /// Build the root file system of an image now rather than at its first run
    BuildRootfs {
        /// Reference or digest
        image: String,
    },
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The directory or archive
    pub source: PathBuf,
    /// Name the image; otherwise it is named as its source says
    #[arg(short = 't', long, visible_alias = "name", value_name = "REFERENCE")]
    pub tag: Option<String>,
}

/// Pull images from registries.
///
/// Credentials are those of `docker login`. What has come is kept when a pull is interrupted, and
/// the next one goes on from there.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// Names as Docker reads them: `debian:12`, `registry.example/team/app@sha256:...`
    #[arg(required = true)]
    pub images: Vec<String>,
    /// Ask without TLS (registries on this host are asked so by themselves if they have none)
    #[arg(long)]
    pub plain_http: bool,
}

#[derive(Debug, Args)]
pub struct LsArgs {
    /// Show digests only
    #[arg(short, long)]
    pub quiet: bool,
    /// The form of the list
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct RmImageArgs {
    /// Remove all names of an image, and also one that is in use
    #[arg(short, long)]
    pub force: bool,
    /// References or digests
    #[arg(required = true)]
    pub images: Vec<String>,
}
