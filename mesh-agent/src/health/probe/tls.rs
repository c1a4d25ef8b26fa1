//! Connections that are secured.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use http::uri::Authority;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Failure;
use crate::model::{Tls, Trust};

/// Who this machine trusts, as it was when it first trusted anybody; or why it does not, and when that was.
static SYSTEM: Mutex<System> = Mutex::new(System::Unknown);

/// After this time it is looked again.
const AGAIN: Duration = Duration::from_secs(10);

enum System {
    Unknown,
    Trusts(Arc<RootCertStore>),
    Failed(Instant, String),
}

static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(ring::default_provider()));

/// Secures connections in one way.
#[derive(Clone)]
pub struct Connector {
    trust: Trust,
    protocol: Vec<u8>,
    /// Made when it is first needed, and can be.
    config: Arc<OnceLock<Arc<ClientConfig>>>,
    name: Option<ServerName<'static>>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Connector {
    /// Whoever answers proves the name that is set, else the host that is asked for, else its address; and
    /// speaks `protocol` (RFC 7301).
    pub(super) fn new(tls: &Tls, host: Option<&Authority>, protocol: &[u8]) -> Self {
        let host = || ServerName::try_from(host?.host().trim_matches(['[', ']']).to_owned()).ok();
        let name = tls.server_name.clone().or_else(host);
        let (trust, protocol, config) = (tls.trust.clone(), protocol.to_vec(), Arc::default());
        Self { trust, protocol, config, name }
    }

    fn config(&self) -> Result<Arc<ClientConfig>, String> {
        if let Some(config) = self.config.get() {
            return Ok(Arc::clone(config));
        }
        let mut config = config(&self.trust)?;
        config.alpn_protocols = vec![self.protocol.clone()];
        // Each check is to prove that the whole of it works.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::clone(self.config.get_or_init(|| Arc::new(config))))
    }

    /// Secures a connection to this address.
    pub(super) async fn secure<S>(
        &self,
        stream: S,
        address: SocketAddr,
    ) -> Result<TlsStream<S>, Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let config = self.config().map_err(Failure::Local)?;
        let name = self.name.clone().unwrap_or_else(|| ServerName::from(address.ip()));
        let secured = TlsConnector::from(config).connect(name, stream).await;
        secured.map_err(|error| Failure::of("TLS", &error))
    }
}

fn config(trust: &Trust) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let roots = match trust {
        Trust::Anybody => {
            let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody));
            return Ok(builder.with_no_client_auth());
        }
        Trust::System => system()?,
        Trust::Listed(authorities) => Arc::clone(&authorities.roots),
    };
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&PROVIDER));
    let verifier = verifier.build().map_err(|error| error.to_string())?;
    Ok(builder.with_webpki_verifier(verifier).with_no_client_auth())
}

/// As other programs of this machine know it.
fn system() -> Result<Arc<RootCertStore>, String> {
    const ADVICE: &str = "install ca-certificates, name a file with `ca`, or use `verify: false`";
    let mut known = SYSTEM.lock().unwrap_or_else(PoisonError::into_inner);
    match &*known {
        System::Trusts(roots) => return Ok(Arc::clone(roots)),
        System::Failed(at, why) if at.elapsed() < AGAIN => return Err(why.clone()),
        System::Unknown | System::Failed(..) => {}
    }
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if !roots.is_empty() {
        let roots = Arc::new(roots);
        *known = System::Trusts(Arc::clone(&roots));
        return Ok(roots);
    }
    let why = found.errors.first().map_or_else(String::new, |error| format!(" ({error})"));
    let why = format!("this machine trusts no certificates{why}: {ADVICE}");
    *known = System::Failed(Instant::now(), why.clone());
    Err(why)
}

/// Believes whoever answers, as far as it is who it says it is.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &PROVIDER.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &PROVIDER.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}
