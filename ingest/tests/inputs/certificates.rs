//! Certificates for a test, made by openssl.

use std::process::Command;

use tempfile::TempDir;

/// Authority, certificate of 127.0.0.1, and a client's.
#[derive(Debug)]
pub(crate) struct Certificates(TempDir);

impl Certificates {
    pub(crate) fn make() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let openssl = |args: &str| {
            let output = Command::new("openssl").args(args.split(' ')).current_dir(folder.path()).output().unwrap();
            assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
        openssl(&format!("req -x509 {key} -keyout ca.key -out ca.crt -subj /CN=authority"));
        for name in ["server", "client"] {
            let extensions = "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=CA:FALSE";
            openssl(&format!(
                "req -x509 -CA ca.crt -CAkey ca.key {key} -keyout {name}.key -out {name}.crt -subj /CN={name} {extensions}"
            ));
        }
        Self(folder)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}
