//! Tests: what TLS trusts. The certificates are good for 127.0.0.1 from 2020 to 2120 and for nothing else; their keys
//! are no secret.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::Transport;
use crate::pull::fake::{Answer, Fake};

const CA: &str = "\
-----BEGIN CERTIFICATE-----
MIIBWzCCAQGgAwIBAgIBATAKBggqhkjOPQQDAjAcMRowGAYDVQQDDBFMYXllcmNh
a2UgdGVzdCBDQTAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowHDEa
MBgGA1UEAwwRTGF5ZXJjYWtlIHRlc3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMB
BwNCAARzUiBxegaQBuLueLWyXonEt7aBcJXUMavuxYDJ34Sb8aFDEKU2mnk9C9xN
rGk3qPgk5u9ao4qHmIL8tyoWfDsNozIwMDAPBgNVHRMBAf8EBTADAQH/MB0GA1Ud
DgQWBBTcoxIF1Ej9y1oEbME+Wj6C+hCXFzAKBggqhkjOPQQDAgNIADBFAiEAjeoQ
9A+Hj2rCrSaft2cNqLo5vTScj6FXcw3sm0/tbaUCICSbwQSfq87/HWAx49Vk1cBh
lGRQMnufE07hYIbJ+Llg
-----END CERTIFICATE-----
";
const SERVER: &str = "\
-----BEGIN CERTIFICATE-----
MIIBkzCCATqgAwIBAgIBAjAKBggqhkjOPQQDAjAcMRowGAYDVQQDDBFMYXllcmNh
a2UgdGVzdCBDQTAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowFDES
MBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEo/TR
iUNGjOPj4jw4T4j+99EbZqdYXB1KLyiugiCwEl25cXqSzkCPZa0gIHsNp1pMlcjo
LBFv6mqv01CxwuaPM6NzMHEwDwYDVR0RBAgwBocEfwAAATAJBgNVHRMEAjAAMBMG
A1UdJQQMMAoGCCsGAQUFBwMBMB0GA1UdDgQWBBSeOiBgz7sCf00GRM94yOA0GdlG
+zAfBgNVHSMEGDAWgBTcoxIF1Ej9y1oEbME+Wj6C+hCXFzAKBggqhkjOPQQDAgNH
ADBEAiAUy6fvGyTRb24lSroeOaEdis4h2YdBm5su+2WYra9QFgIgCPTLCbrUt9it
xo6iRVcxsYzfyCqwXalBCezgKDEHzFY=
-----END CERTIFICATE-----
";
const SERVER_KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgERASVHNvhLwJ/Fwc
QjonGTKErLxkniNbHvcPx9HuylmhRANCAASj9NGJQ0aM4+PiPDhPiP730Rtmp1hc
HUovKK6CILASXblxepLOQI9lrSAgew2nWkyVyOgsEW/qaq/TULHC5o8z
-----END PRIVATE KEY-----
";

/// Serves one connection by TLS and returns its URL.
fn serve_once() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let url = format!("https://{}/", listener.local_addr().expect("address"));
    let chain = vec![CertificateDer::from_pem_slice(SERVER.as_bytes()).expect("certificate")];
    let key = PrivateKeyDer::from_pem_slice(SERVER_KEY.as_bytes()).expect("key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("config");
    std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("accept");
        let session = rustls::ServerConnection::new(Arc::new(config)).expect("session");
        let mut stream = rustls::StreamOwned::new(session, socket);
        // A client that does not trust us hangs up here.
        if stream.read(&mut [0; 4096]).is_ok() {
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\ntrue";
            stream.write_all(answer).expect("answer");
        }
    });
    url
}

#[test]
fn an_installed_ca_is_trusted_and_nothing_else_is() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("site.crt"), CA).expect("CA");
    let transport = Transport::new(dir.path()).expect("transport");
    let reply = transport.get_json::<bool>(&serve_once(), Duration::from_secs(10));
    assert_eq!(reply.expect("trusted"), Some(true));

    let other = tempfile::tempdir().expect("directory");
    std::fs::write(other.path().join("site.pem"), SERVER).expect("a certificate that is no CA");
    let transport = Transport::new(other.path()).expect("transport");
    let reply = transport.get_json::<bool>(&serve_once(), Duration::from_secs(10));
    let error = reply.expect_err("another CA");
    assert!(format!("{error:?}").contains("UnknownIssuer"), "{error:?}");
}

#[test]
fn a_redirect_to_https_without_a_ca_is_an_error_and_no_panic() {
    let fake = Fake::start();
    let location = ("Location".to_owned(), serve_once());
    fake.add("/x", Answer { status: 302, headers: vec![location], ..Answer::ok(Vec::new()) });
    let transport = Transport::new(Path::new("/nonexistent")).expect("transport");
    let error = transport.get(&format!("{}/x", fake.url()), &[]).expect_err("no CA");
    assert!(format!("{error:?}").contains("UnknownIssuer"), "{error:?}");
}
