//! Certificates, made for one test.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// An authority, and what it has vouched for, as files.
pub struct Certified {
    /// The authority's certificate.
    pub authority: PathBuf,
    /// The server's, and its key.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl Certified {
    /// A new authority that vouches for a server of these names and addresses.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn new(directory: &Path, names: &[&str]) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
        let at = |name: &str| directory.join(name);
        let files =
            Self { authority: at("ca.pem"), certificate: at("cert.pem"), key: at("key.pem") };
        fs::write(&files.authority, issuer.pem())?;
        fs::write(&files.certificate, certificate.pem())?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}
