//! Why an image was not pulled.

use std::io;

use mvm_image::{Digest, ImportError, Reference, SourceError, StoreError};
use oci_client::errors::{OciDistributionError, OciErrorCode};

use crate::credentials::CredentialsError;

/// Why an image was not pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The host has no descriptors or threads for it.
    #[error("cannot start: {0}")]
    Runtime(io::Error),
    /// Credentials that are there cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// Nobody answers there, or not in our language.
    #[error("registry {registry} cannot be reached: {reason}")]
    Unreachable {
        /// The registry.
        registry: String,
        /// What went wrong.
        reason: String,
    },
    /// Somebody answers who cannot show that he is the registry.
    #[error(
        "registry {registry} has no certificate that this host trusts ({reason}); its authority \
         belongs among the host's certificates, or into a file that SSL_CERT_FILE names"
    )]
    Certificate {
        /// The registry.
        registry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such image.
    #[error("registry {registry} has no image `{name}`")]
    NotFound {
        /// The registry.
        registry: String,
        /// The image.
        name: String,
    },
    /// We may not have it; some registries say so of what does not exist, too.
    #[error(
        "registry {registry} refuses `{name}`: there is no such image, or it needs a login \
         (`docker login {registry}`)"
    )]
    Denied {
        /// The registry.
        registry: String,
        /// The image.
        name: String,
    },
    /// The registry has had enough of us.
    #[error("registry {registry} allows no more requests for now: {reason}")]
    TooMany {
        /// The registry.
        registry: String,
        /// What it says.
        reason: String,
    },
    /// The registry fails.
    #[error("registry {registry}: {reason}")]
    Registry {
        /// The registry.
        registry: String,
        /// What it says.
        reason: String,
    },
    /// What came is not what its digest says.
    #[error("what registry {registry} sends as {expected} is damaged: its digest is {found}")]
    Digest {
        /// The registry.
        registry: String,
        /// Digest that was asked for.
        expected: Digest,
        /// Digest of what came.
        found: Digest,
    },
    /// More came than there should be.
    #[error("what registry {registry} sends as {digest} is longer than the {size} bytes it stated")]
    TooLong {
        /// The registry.
        registry: String,
        /// Digest that was asked for.
        digest: Digest,
        /// Bytes that were stated.
        size: u64,
    },
    /// A manifest or configuration is larger than allowed.
    #[error("a document of `{name}` has {size} bytes, the limit is {limit}")]
    DocumentSize {
        /// The image.
        name: String,
        /// Bytes.
        size: u64,
        /// Most bytes.
        limit: u64,
    },
    /// The image asks for more than any image needs.
    #[error("`{name}` refers to more than {limit} {what}")]
    TooMuch {
        /// The image.
        name: String,
        /// Most of them.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
    /// The image is malformed, or none for this host.
    #[error(transparent)]
    Source(Box<SourceError>),
    /// The store failed.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// All came, and it is no image that can be run.
    #[error(transparent)]
    Import(Box<ImportError>),
    /// Nobody wants it any more.
    #[error("the pull was cancelled; what has come is kept")]
    Cancelled,
}

macro_rules! boxed {
    ($($variant:ident($error:ty))*) => { $(
        impl From<$error> for PullError {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )* };
}

boxed! { Source(SourceError) Store(StoreError) Import(ImportError) }

/// What came of a request that failed.
pub(crate) struct Failure {
    pub(crate) error: PullError,
    /// Trying again may help.
    pub(crate) passing: bool,
}

impl Failure {
    pub(crate) fn lasting(error: impl Into<PullError>) -> Self {
        Self { error: error.into(), passing: false }
    }
}

/// What the client says, in our words.
pub(crate) fn classify(registry: &str, name: &Reference, error: OciDistributionError) -> Failure {
    let registry = registry.to_owned();
    let name = name.to_string();
    let lasting = |error| Failure { error, passing: false };
    match error {
        OciDistributionError::RequestError(error) if let Some(reason) = distrust(&error) => {
            lasting(PullError::Certificate { registry, reason })
        }
        OciDistributionError::RequestError(error) => {
            let reason = chain(&error.without_url());
            Failure { error: PullError::Unreachable { registry, reason }, passing: true }
        }
        OciDistributionError::IoError(error) => {
            let reason = chain(&error);
            Failure { error: PullError::Unreachable { registry, reason }, passing: true }
        }
        OciDistributionError::UnauthorizedError { .. } => {
            lasting(PullError::Denied { registry, name })
        }
        OciDistributionError::AuthenticationFailure(reason) => {
            tracing::debug!(%registry, %reason, "no token");
            lasting(PullError::Denied { registry, name })
        }
        OciDistributionError::ServerError { code: 404, .. } => {
            lasting(PullError::NotFound { registry, name })
        }
        OciDistributionError::ServerError { code: 401 | 403, .. } => {
            lasting(PullError::Denied { registry, name })
        }
        OciDistributionError::ServerError { code, message, .. } => {
            let message: String = printable(&message);
            let reason = format!("answer {code}: {message}");
            match code {
                429 => lasting(PullError::TooMany { registry, reason }),
                _ => Failure {
                    error: PullError::Registry { registry, reason },
                    passing: code >= 500,
                },
            }
        }
        OciDistributionError::RegistryError { envelope, .. } => {
            let said: Vec<_> = envelope.errors.iter().map(|e| printable(&e.message)).collect();
            let reason = said.join("; ");
            let is =
                |codes: &[OciErrorCode]| envelope.errors.iter().any(|e| codes.contains(&e.code));
            use OciErrorCode::{
                BlobUnknown, Denied, ManifestBlobUnknown, ManifestUnknown, NameUnknown, NotFound,
                Toomanyrequests, Unauthorized,
            };
            if is(&[ManifestUnknown, NameUnknown, NotFound, ManifestBlobUnknown, BlobUnknown]) {
                lasting(PullError::NotFound { registry, name })
            } else if is(&[Unauthorized, Denied]) {
                lasting(PullError::Denied { registry, name })
            } else if is(&[Toomanyrequests]) {
                lasting(PullError::TooMany { registry, reason })
            } else {
                lasting(PullError::Registry { registry, reason })
            }
        }
        error => lasting(PullError::Registry { registry, reason: printable(&error.to_string()) }),
    }
}

/// An error with all that caused it; the client's own says only "error sending request".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    printable(&text)
}

/// What is wrong with the other side's certificate, if that is what failed.
fn distrust(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(rustls::Error::InvalidCertificate(reason)) = cause.downcast_ref() {
            return Some(printable(&reason.to_string()));
        }
        // What an I/O error is made of is not what it says its source is.
        next = match cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => cause.source(),
        };
    }
    None
}

/// What somebody else says, fit for one line of a terminal.
fn printable(text: &str) -> String {
    const LONGEST: usize = 300;
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.trim().chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_strangers_say_stays_on_one_line() {
        assert_eq!(printable(" no\u{1b}[31m\nsuch\t "), "no [31m such");
        assert_eq!(printable(&"x".repeat(1000)).len(), 300);
    }

    #[test]
    fn answers_are_told_apart() {
        let name: Reference = "registry.example/a".parse().unwrap();
        let server = |code| OciDistributionError::ServerError {
            code,
            url: String::new(),
            message: "because".into(),
        };
        let of = |error| classify("registry.example", &name, error);
        assert!(matches!(of(server(404)).error, PullError::NotFound { .. }));
        assert!(matches!(of(server(403)).error, PullError::Denied { .. }));
        assert!(matches!(of(server(429)).error, PullError::TooMany { .. }));
        assert!(of(server(502)).passing && !of(server(400)).passing);
    }
}
