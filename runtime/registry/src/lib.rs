//! Pulls images from registries (OCI distribution specification) into an [`mvm_image::Store`].
//!
//! What has come is kept in the store when a pull fails or is interrupted, and the next one goes on
//! from there, in the middle of a layer if need be. Nothing of it can be run before all of it is
//! there and its digests are right. Credentials are Docker's (`docker login`, credential helpers).

mod connection;
mod credentials;
mod download;
mod error;

use std::sync::Once;

use mvm_image::{Image, Limits, Progress, Reference, Store};

use connection::Connection;
pub use credentials::CredentialsError;
pub use error::PullError;

/// How an image is pulled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PullOptions {
    /// The registry is asked without TLS, and what it sends can be changed on the way. Registries
    /// on this host are asked so by themselves if they have no TLS.
    pub plain_http: bool,
}

/// Pulls `name` into `store`.
///
/// # Errors
///
/// [`PullError`]. What has come is kept, unless it is wrong.
pub fn pull(
    store: &Store,
    name: &Reference,
    options: PullOptions,
    progress: &dyn Progress,
) -> Result<Vec<Image>, PullError> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // It fails if there is one already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(PullError::Runtime)?;
    let incoming = store.incoming(name)?;
    let fetched = runtime.block_on(cancellable(progress, async {
        progress.begin(&format!("ask for {name}"), None);
        let connection = Connection::open(name, options).await?;
        download::fetch(&connection, &incoming, &Limits::default(), progress).await
    }));
    // Requests that are under way are given up with the runtime.
    drop(runtime);
    progress.end();
    Ok(incoming.import(&fetched?, name, progress)?)
}

/// `work`, unless nobody wants its result any more.
async fn cancellable<T>(
    progress: &dyn Progress,
    work: impl Future<Output = Result<T, PullError>>,
) -> Result<T, PullError> {
    let cancelled = async {
        while !progress.is_cancelled() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let (work, cancelled) = (std::pin::pin!(work), std::pin::pin!(cancelled));
    match futures_util::future::select(work, cancelled).await {
        futures_util::future::Either::Left((result, _)) => result,
        futures_util::future::Either::Right(_) => Err(PullError::Cancelled),
    }
}
