//! Placeholder of the TFTP server: the seam that `serve` is written against.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use bytes::Bytes;
use tokio::sync::watch;

/// What the TFTP server is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TftpConfig {
    /// Where it listens.
    pub bind: SocketAddr,
    /// Directory of files.
    pub root: Option<PathBuf>,
    /// Files of its own.
    pub builtin: BTreeMap<String, Bytes>,
}

/// Why the TFTP server stopped.
#[derive(Debug, thiserror::Error)]
#[error("the TFTP server is not part of this build")]
pub struct TftpError;

/// Placeholder.
///
/// # Errors
/// Never.
pub async fn serve(
    config: TftpConfig,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), TftpError> {
    drop(config);
    let _ = shutdown.wait_for(|stop| *stop).await;
    Ok(())
}
