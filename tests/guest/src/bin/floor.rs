//! The floor: PID 1 that mounts three file systems, loads the modules it was given in the order of their names, and gets an
//! address by DHCP. What an init cannot do without on the way to an address; no identity, no log, no retry of anything but a
//! lost packet, no second interface.

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest::dhcp::{self, Lease};
use guest::netlink::Netlink;
use nix::sys::socket::{setsockopt, sockopt};
use rustix::mount::{MountFlags, mount};

/// The modules, each named by its place in the order.
const MODULES: &str = "/modules";
/// Where the kernel shows interfaces.
const INTERFACES: &str = "/sys/class/net";
/// How long the one interface may take to come.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks for it.
const LOOK: Duration = Duration::from_millis(1);
/// After which a message that was not answered is sent again.
const AGAIN: Duration = Duration::from_secs(2);

fn main() {
    let said = match run() {
        Ok(address) => format!("floor: {address}\n"),
        Err(problem) => format!("floor: {problem}\n"),
    };
    // A console that is gone changes nothing.
    io::stdout().write_all(said.as_bytes()).unwrap_or_default();
    loop {
        std::thread::park();
    }
}

fn run() -> Result<Ipv4Addr, Box<dyn Error>> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(place)?;
        mount(kind, place, kind, MountFlags::empty(), None)?;
    }
    let mut modules: Vec<PathBuf> =
        fs::read_dir(MODULES)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    modules.sort();
    for module in modules {
        rustix::system::init_module(&fs::read(&module)?, c"")
            .map_err(|error| format!("{}: {error}", module.display()))?;
    }
    let name = interface()?;
    let read = |file: &str| fs::read_to_string(format!("{INTERFACES}/{name}/{file}"));
    let index = read("ifindex")?.trim().parse()?;
    let mac = mac(read("address")?.trim()).ok_or("no Ethernet address")?;
    let netlink = Netlink::open(false)?;
    netlink.up(index)?;
    let lease = lease(&name, mac)?;
    netlink.add_address(index, lease.address, lease.prefix)?;
    Ok(Ipv4Addr::from(lease.address))
}

/// The first interface that is hardware: a kernel with bonding built in has `bond0`.
fn interface() -> Result<String, Box<dyn Error>> {
    let looks = PATIENCE.as_millis() / LOOK.as_millis();
    for _ in 0..looks {
        for entry in fs::read_dir(INTERFACES)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if Path::new(INTERFACES).join(&name).join("device").exists() {
                return Ok(name);
            }
        }
        std::thread::sleep(LOOK);
    }
    Err("no interface came".into())
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// DISCOVER, OFFER, REQUEST, ACK. A socket that is bound to its interface speaks without an address (ip(7)).
fn lease(name: &str, mac: [u8; 6]) -> Result<Lease, Box<dyn Error>> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 68))?;
    socket.set_broadcast(true)?;
    socket.set_read_timeout(Some(AGAIN))?;
    setsockopt(&socket, sockopt::BindToDevice, &name.into())?;
    let mut xid = [0; 4];
    rustix::rand::getrandom(&mut xid, rustix::rand::GetRandomFlags::empty())?;
    let mut offer = None;
    let mut buffer = [0; 1500];
    loop {
        let message = dhcp::message(xid, mac, offer.as_ref());
        socket.send_to(&message, (Ipv4Addr::BROADCAST, 67))?;
        match socket.recv(&mut buffer) {
            Ok(length) => match dhcp::answer(buffer.get(..length).unwrap_or_default(), xid) {
                Some(lease) if lease.granted => return Ok(lease),
                Some(lease) => offer = Some(lease),
                None => {}
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}
