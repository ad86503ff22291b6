//! A registry that answers.

use std::future::Future;
use std::net::IpAddr;
use std::time::Duration;

use mvm_image::Reference;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, RegistryOperation};

use crate::error::{Failure, classify};
use crate::{PullError, PullOptions, credentials};

/// How long it may take until somebody answers.
const CONNECT: Duration = Duration::from_secs(20);

/// Longest silence in an answer.
const SILENCE: Duration = Duration::from_secs(60);

/// How long a document may take: it has no size that is known before, and ends in memory.
const DOCUMENT: Duration = Duration::from_secs(60);

const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// A registry that has answered, and what is wanted of it.
pub(crate) struct Connection {
    pub(crate) client: Client,
    pub(crate) name: Reference,
    pub(crate) reference: oci_client::Reference,
    pub(crate) registry: String,
    auth: RegistryAuth,
}

impl Connection {
    /// Finds out how the registry of `name` wants to be spoken to.
    pub(crate) async fn open(name: &Reference, options: PullOptions) -> Result<Self, PullError> {
        let registry = name.registry().to_owned();
        let auth = credentials::of(&registry)?;
        let text = name.canonical();
        let reference: oci_client::Reference = text.parse().map_err(|e| PullError::Registry {
            registry: registry.clone(),
            reason: format!("`{text}` is no name there: {e}"),
        })?;
        let connect = async |plain: bool| {
            let client = client(plain).map_err(|e| classify(&registry, name, e))?;
            let asked = client.auth(&reference, &auth, RegistryOperation::Pull);
            limited(&registry, CONNECT, asked)
                .await?
                .map(|_| client)
                .map_err(|e| classify(&registry, name, e))
        };
        let client = match connect(options.plain_http).await {
            Ok(client) => client,
            // What is on this host has no need of TLS, and often has none.
            Err(Failure { error: PullError::Unreachable { .. }, .. })
                if !options.plain_http && is_loopback(&registry) =>
            {
                connect(true).await.map_err(|failure| failure.error)?
            }
            Err(failure) => return Err(failure.error),
        };
        Ok(Self { client, name: name.clone(), reference, registry, auth })
    }

    /// The document that `reference` means, checked against its digest if it has one.
    pub(crate) async fn document(
        &self,
        reference: &oci_client::Reference,
    ) -> Result<Vec<u8>, Failure> {
        let asked = self.client.pull_manifest_raw(reference, &self.auth, &MANIFEST_TYPES);
        let (body, _) = limited(&self.registry, DOCUMENT, asked)
            .await?
            .map_err(|e| classify(&self.registry, &self.name, e))?;
        Ok(body.to_vec())
    }
}

/// `work`, given up after `limit`.
async fn limited<T>(
    registry: &str,
    limit: Duration,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    tokio::time::timeout(limit, work).await.map_err(|_| Failure {
        error: PullError::Unreachable {
            registry: registry.to_owned(),
            reason: format!("no answer within {} s", limit.as_secs()),
        },
        passing: true,
    })
}

fn client(plain: bool) -> Result<Client, oci_client::errors::OciDistributionError> {
    Client::try_from(ClientConfig {
        protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
        connect_timeout: Some(CONNECT),
        read_timeout: Some(SILENCE),
        user_agent: concat!("mvm/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    })
}

/// True for registries that only this host can be.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host,
        _ => registry,
    };
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost"
        || host.ends_with(".localhost")
        || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_told_from_others() {
        for (registry, here) in [
            ("localhost:5000", true),
            ("localhost", true),
            ("127.0.0.5:80", true),
            ("[::1]:5000", true),
            ("registry.localhost", true),
            ("docker.io", false),
            ("10.0.0.1:5000", false),
            ("localhost.example", false),
        ] {
            assert_eq!(is_loopback(registry), here, "{registry}");
        }
    }
}
