//! Debian's `docker-registry` with images in it, on a port of its own.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::{eventually, run_with};

/// A registry that runs until this is dropped.
#[derive(Debug)]
pub struct Registry {
    dir: TempDir,
    daemon: Child,
    port: u16,
}

/// What a registry asks of those who come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Demands {
    /// The user `user` with the password `secret`.
    pub login: bool,
    /// TLS, with a certificate that [`Registry::certificate`] vouches for.
    pub tls: bool,
}

/// `user` and `secret` as `htpasswd -B` writes them.
const LOGIN: &str = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

impl Registry {
    /// Starts one with the image of the layout archive `image` as `NAME:TAG`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[track_caller]
    pub fn start(image: &Path, name: &str, tag: &str, demands: Demands) -> Self {
        let dir = tempfile::Builder::new().prefix("mvm-reg-").tempdir().expect("a directory");
        let root = dir.path();
        store(root, image, name, tag);
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
        let port = port.expect("a free port").port();
        let at = |name: &str| root.join(name).display().to_string();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {:?}}}\n\
             http:\n  addr: 127.0.0.1:{port}\n",
            at("data")
        );
        if demands.tls {
            certify(root);
            let (crt, key) = (at("tls.crt"), at("tls.key"));
            config += &format!("  tls: {{certificate: {crt:?}, key: {key:?}}}\n");
        }
        if demands.login {
            fs::write(root.join("htpasswd"), LOGIN).expect("a file");
            config += &format!("auth:\n  htpasswd: {{realm: test, path: {:?}}}\n", at("htpasswd"));
        }
        fs::write(root.join("config.yml"), config).expect("a file");
        let log = fs::File::create(root.join("log")).expect("a file");
        let daemon = Command::new("docker-registry")
            .args(["serve", &at("config.yml")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("docker-registry");
        let mut this = Self { dir, daemon, port };
        eventually("an answer of the registry", || {
            if let Ok(Some(status)) = this.daemon.try_wait() {
                panic!("the registry ended with {status}:\n{}", this.log());
            }
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        this
    }

    /// What it is called in names of images.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// The certificate that its own is signed with: itself.
    pub fn certificate(&self) -> std::path::PathBuf {
        self.dir.path().join("tls.crt")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Puts an image where the registry's file system driver looks for it, as if it had been pushed.
fn store(root: &Path, image: &Path, name: &str, tag: &str) {
    let script = r#"
        mkdir "$1/layout"; tar -C "$1/layout" -xf "$2"; cd "$1/layout"
        m=$(sed -E 's/.*"digest":"sha256:([0-9a-f]+)".*/\1/' index.json)
        v2=$1/data/docker/registry/v2; repo=$v2/repositories/$3
        link() { mkdir -p "$2"; printf 'sha256:%s' "$1" >"$2/link"; }
        for blob in blobs/sha256/*; do
            h=${blob##*/}; to=$v2/blobs/sha256/$(printf %.2s "$h")/$h
            mkdir -p "$to"; cp "$blob" "$to/data"; link "$h" "$repo/_layers/sha256/$h"
        done
        link "$m" "$repo/_manifests/revisions/sha256/$m"
        link "$m" "$repo/_manifests/tags/$4/current"
        link "$m" "$repo/_manifests/tags/$4/index/sha256/$m""#;
    let mut command = Command::new("sh");
    command.args(["-ec", script, "sh"]).arg(root).arg(image).args([name, tag]);
    run_with(command, b"", std::time::Duration::from_secs(120)).expect_code(0);
}

fn certify(root: &Path) {
    let script = r#"cd "$1"; openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout tls.key -out tls.crt \
        -subj /CN=localhost -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE \
        -addext extendedKeyUsage=serverAuth 2>log"#;
    let mut command = Command::new("sh");
    command.args(["-ec", script, "sh"]).arg(root);
    run_with(command, b"", std::time::Duration::from_secs(120)).expect_code(0);
}
