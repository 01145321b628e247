//! One interface's DHCPv6 task, between routers, servers, the kernel and the manager. It begins with the first word of a
//! router that there is something to be had.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::Ipv6Addr;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedReceiver;

use super::client6::{Action, Client, Event};
use super::links;
use super::message6::{self, decode};
use super::nic::{Nic, Report, SOCKET_PAUSE};
use super::socket6::ServerSocket;

struct Task {
    nic: Nic,
    who: message6::Client,
    client: Client,
    socket: Option<ServerSocket>,
}

/// Serves an interface until the manager lets go of it. `news` are the words of routers, the kernel's and the link's.
pub(super) async fn run(nic: Nic, who: message6::Client, mut news: UnboundedReceiver<Event>) {
    let seed = RandomState::new().build_hasher().finish();
    let client = Client::new(seed, Instant::now());
    let mut task = Task { nic, who, client, socket: None };
    loop {
        let deadline = task.client.deadline();
        let event = tokio::select! {
            event = news.recv() => match event {
                Some(event) => event,
                None => return,
            },
            bytes = async {
                match &task.socket {
                    Some(socket) => socket.receive().await,
                    None => std::future::pending().await,
                }
            } => match bytes {
                Ok(bytes) => match decode(&bytes, &task.who) {
                    Some(answer) => Event::Heard(answer),
                    None => continue,
                },
                Err(error) => {
                    log::warn!("{}: DHCPv6: cannot receive: {error}", task.nic.link.name);
                    tokio::time::sleep(SOCKET_PAUSE).await;
                    continue;
                }
            },
            () = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            } => Event::Timer,
        };
        task.step(event).await;
    }
}

impl Task {
    async fn step(&mut self, event: Event) {
        let actions = self.client.handle(event, Instant::now());
        let link = &self.nic.link;
        if !self.client.listens() && actions.iter().all(|a| !matches!(a, Action::Send(_))) {
            self.socket = None;
        } else if self.socket.is_none() {
            match ServerSocket::open(&link.name, link.index) {
                Ok(socket) => self.socket = Some(socket),
                Err(error) => self.nic.say(&format!("DHCPv6: cannot open port 546: {error}")),
            }
        }
        for action in actions {
            self.act(action).await;
        }
    }

    async fn act(&self, action: Action) {
        let nic = &self.nic;
        let (name, index) = (&nic.link.name, nic.link.index);
        match action {
            Action::Say(what) => nic.say(&what),
            Action::Send(outgoing) => {
                let Some(socket) = &self.socket else { return };
                // A send that fails is like a packet that is lost: the timer tries again.
                match socket.send(&outgoing.encode(&self.who)).await {
                    Ok(()) => log::debug!("{name}: DHCPv6: sent {:?}", outgoing.kind),
                    Err(error) => {
                        log::warn!("{name}: DHCPv6: cannot send {:?}: {error}", outgoing.kind);
                    }
                }
            }
            Action::Configure(lease) => {
                if let Err(error) = links::set_lease(&nic.handle, index, &lease).await {
                    nic.say(&format!("the address {} was refused: {error}", lease.address));
                }
            }
            Action::Deconfigure(address) => self.take(address).await,
            Action::Names(servers, domains) => {
                nic.report(Report::Names(index, servers, domains));
            }
        }
    }

    async fn take(&self, address: Ipv6Addr) {
        let nic = &self.nic;
        // The kernel has taken it away by itself if its time is over.
        if let Err(error) = links::delete_v6(&nic.handle, nic.link.index, address).await {
            log::debug!("{}: cannot take {address} away: {error}", nic.link.name);
        }
    }
}
