//! Who we are for a registry: what `docker login` has left.

use std::path::{Path, PathBuf};

use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::secrets::RegistryAuth;

/// Under which name Docker keeps the credentials of its own registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Why credentials that are there cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the credentials for {registry} in {path} cannot be used: {reason}")]
pub struct CredentialsError {
    registry: String,
    path: PathBuf,
    reason: String,
}

/// The credentials for `registry`; anonymous if there are none.
///
/// # Errors
///
/// [`CredentialsError`]: to be somebody else than the user has said would only fail later, with a
/// reason that is not the true one.
pub(crate) fn of(registry: &str) -> Result<RegistryAuth, CredentialsError> {
    let Some(path) = config_path() else { return Ok(RegistryAuth::Anonymous) };
    of_file(registry, &path)
}

fn config_path() -> Option<PathBuf> {
    let named = |variable| std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = named("DOCKER_CONFIG").or_else(|| Some(named("HOME")?.join(".docker")))?;
    Some(dir.join("config.json")).filter(|path| path.exists())
}

fn of_file(registry: &str, path: &Path) -> Result<RegistryAuth, CredentialsError> {
    let failed = |reason: String| CredentialsError {
        registry: registry.to_owned(),
        path: path.to_owned(),
        reason,
    };
    let file = std::fs::File::open(path).map_err(|e| failed(e.to_string()))?;
    let server = if registry == "docker.io" { DOCKER_HUB } else { registry };
    match docker_credential::get_credential_from_reader(std::io::BufReader::new(file), server) {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            Ok(RegistryAuth::Basic(user, password))
        }
        Ok(DockerCredential::IdentityToken(_)) => Err(failed(format!(
            "it is an identity token, which mvm cannot use; `docker login {registry}` with a \
             password or an access token instead"
        ))),
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(RegistryAuth::Anonymous),
        // What a helper says of a registry that it does not know.
        Err(CredentialRetrievalError::HelperFailure { stdout, .. })
            if stdout.contains("credentials not found") =>
        {
            Ok(RegistryAuth::Anonymous)
        }
        Err(CredentialRetrievalError::HelperFailure { helper, stdout, stderr }) => {
            let said = format!("{} {}", stdout.trim(), stderr.trim());
            Err(failed(format!("the helper `{helper}` failed: {}", said.trim())))
        }
        Err(CredentialRetrievalError::ConfigReadError) => {
            Err(failed("the file is not Docker's JSON".into()))
        }
        Err(error) => Err(failed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_found_by_registry() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        // user:pass and hub:secret in base 64.
        let config = r#"{"auths": {
            "localhost:5000": {"auth": "dXNlcjpwYXNz"},
            "https://index.docker.io/v1/": {"auth": "aHViOnNlY3JldA=="},
            "token.example": {"auth": "eDo=", "identitytoken": "abc"},
            "damaged.example": {"auth": "%"}
        }}"#;
        std::fs::write(&path, config).unwrap();
        let basic = |user: &str, password: &str| RegistryAuth::Basic(user.into(), password.into());
        assert_eq!(of_file("localhost:5000", &path).unwrap(), basic("user", "pass"));
        assert_eq!(of_file("docker.io", &path).unwrap(), basic("hub", "secret"));
        assert_eq!(of_file("other.example", &path).unwrap(), RegistryAuth::Anonymous);
        let error = of_file("token.example", &path).unwrap_err().to_string();
        assert!(error.contains("docker login token.example"), "{error}");
        assert!(of_file("damaged.example", &path).is_err());
        std::fs::write(&path, "{").unwrap();
        let error = of_file("localhost:5000", &path).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("JSON"), "{error}");
    }
}
