//! A TCP proxy that cuts its first long connection in the middle, and counts what clients send.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A running proxy; its threads end with the process.
pub(crate) struct CuttingProxy {
    pub(crate) address: SocketAddr,
    sent: Arc<AtomicU64>,
    cut: Arc<AtomicBool>,
}

impl CuttingProxy {
    /// Forwards to `to`, and cuts the connection over which `after` bytes have been sent, once.
    pub(crate) fn start(to: SocketAddr, after: u64) -> Self {
        Self::start_and(to, after, || ())
    }

    /// The same, and calls `on_cut` before either end can notice.
    pub(crate) fn start_and(
        to: SocketAddr,
        after: u64,
        on_cut: impl Fn() + Clone + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let (sent, cut) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (sent_too, cut_too) = (Arc::clone(&sent), Arc::clone(&cut));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(to) else { return };
                let (sent, cut) = (Arc::clone(&sent_too), Arc::clone(&cut_too));
                let back = (server.try_clone().expect("clone"), client.try_clone().expect("clone"));
                std::thread::spawn(move || forward(back.0, back.1, |_| true));
                let on_cut = on_cut.clone();
                std::thread::spawn(move || {
                    let mut here = 0;
                    forward(client, server, |bytes| {
                        sent.fetch_add(bytes, Ordering::SeqCst);
                        here += bytes;
                        let goes_on = here < after || cut.swap(true, Ordering::SeqCst);
                        if !goes_on {
                            on_cut();
                        }
                        goes_on
                    });
                });
            }
        });
        Self { address, sent, cut }
    }

    /// Bytes that clients have sent, heads included.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// Whether the connection was cut.
    pub(crate) fn has_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, mut go_on: impl FnMut(u64) -> bool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() || !go_on(read as u64) {
            break;
        }
    }
    // The other direction ends by this too.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
