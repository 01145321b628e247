//! Taking interfaces on: bonds are made, slaves enslaved, VLANs put on their parents, addresses asked for; and what is
//! waited for while something of it is missing.

use std::path::Path;

use protocol::network::{Looks, Role};
use tokio::sync::watch;

use super::{Known, Manager, links, send};
use crate::network::links::Link;
use crate::network::six::Six;
use crate::network::{NetworkEvent, client6, files, metric, nic};

impl Manager {
    /// Makes the bonds; the interfaces that become parts of them may come much later.
    pub(super) async fn make_bonds(&mut self) {
        for bond in self.wish.bonds.clone() {
            if let Err(error) = links::make_bond(&self.handle, &bond).await {
                let why = format!("the kernel makes no bond like this: {error}");
                self.trouble(&bond.name, why);
            }
        }
    }

    fn trouble(&mut self, name: &str, why: String) {
        log::error!("{name}: {why}");
        self.troubles.insert(name.to_owned(), why);
    }

    /// Takes an interface on, or notes what has changed.
    pub(super) async fn link(&mut self, link: Link) {
        let Some(known) = self.known.get_mut(&link.index) else {
            return self.take_on(link, None).await;
        };
        let is_slave = matches!(known.role, Role::Slave(_));
        if known.link.mac() != link.mac() && !is_slave {
            // A bond has taken the address of its first slave: servers are to know it by that one.
            let old = self.known.remove(&link.index);
            return self.take_on(link, old).await;
        }
        let is_up = link.carrier && !known.link.carrier;
        known.link = link.clone();
        known.carrier.send_if_modified(|carrier| {
            let changed = *carrier != link.carrier;
            *carrier = link.carrier;
            changed
        });
        if is_up && !is_slave {
            if let Some(asks) = &known.asks {
                send(asks, client6::Event::CarrierBack);
            }
            self.link_up(&link);
            self.make_vlans(&link).await;
        }
    }

    fn link_up(&mut self, link: &Link) {
        let Some(known) = self.known.get(&link.index) else { return };
        let why = known.ip().filter(|_| known.addresses().is_empty()).and_then(|ip| {
            let dhcp4 = ip.dhcp4.then_some("waiting for DHCP");
            dhcp4.or((ip.slaac || ip.dhcp6).then_some("waiting for a router"))
        });
        self.waits(link.index, why.map(str::to_owned));
        (self.sink)(NetworkEvent::LinkUp { link: link.name.clone(), mac: link.mac() });
    }

    /// What is known of an interface without looking after it.
    fn role(&self, link: &Link, own: protocol::ids::Mac) -> Role {
        let driver = self.wish.asks_for_drivers().then(|| driver(&link.name)).flatten();
        let is_boot = self.bootif.is_some_and(|boot| boot == own || boot == link.mac());
        let looks = Looks {
            name: &link.name,
            mac: own,
            driver: driver.as_deref(),
            is_virtual: link.is_virtual,
            is_boot,
        };
        self.wish.role(&looks, self.bootif.is_some())
    }

    async fn take_on(&mut self, link: Link, old: Option<Known>) {
        let own = match &old {
            Some(old) if !link.is_virtual => old.own,
            _ => link.permanent.unwrap_or(link.mac()),
        };
        let role = self.role(&link, own);
        if role == Role::Leave {
            return;
        }
        log::info!("{}: {} found", link.name, link.mac());
        let metric = self.metric(&link, own);
        let (carrier, watched) = watch::channel(link.carrier);
        let index = link.index;
        let (six, told) = old.map_or((Six::default(), Vec::new()), |old| (old.six, old.told));
        let fixed = Vec::new();
        let (grant, asks, waits) = (None, None, None);
        let known = Known {
            link: link.clone(),
            own,
            role: role.clone(),
            carrier,
            metric,
            grant,
            fixed,
            six,
            asks,
            waits,
            told,
        };
        self.known.insert(index, known);
        match role {
            Role::Leave => {}
            Role::Slave(bond) => self.enslave(&link, own, &bond).await,
            Role::Carry { mtu } => self.carry(&link, mtu).await,
            Role::Address { ip, shared } => {
                files::set_ipv6(&link.name, &ip);
                let Some(nic) = self.nic(index) else { return };
                if link.is_up
                    && link.carrier
                    && ip.slaac
                    && let Some(routers) = &self.routers
                {
                    // An earlier agent has brought it up, and the kernel asks only once.
                    if let Err(error) = routers.solicit(index) {
                        log::debug!("{}: cannot ask for routers: {error}", link.name);
                    }
                }
                let shared = shared.then(|| std::sync::Arc::clone(&self.shared));
                tokio::spawn(nic::run(nic, ip, shared, watched));
            }
        }
        if link.carrier && !matches!(self.known.get(&index).map(|k| &k.role), Some(Role::Slave(_)))
        {
            self.link_up(&link);
        }
        self.make_vlans(&link).await;
    }

    fn metric(&self, link: &Link, own: protocol::ids::Mac) -> u32 {
        // A VLAN has the address of what carries it; where that one has a default route too, it is the one that booted.
        let parent = self.wish.vlans.iter().find(|vlan| vlan.name == link.name);
        let parent = parent.and_then(|vlan| self.by_name(&vlan.parent));
        let is_behind = parent.is_some_and(|parent| parent.ip().is_some());
        metric(self.bootif == Some(own) && !is_behind, link.index)
    }

    fn by_name(&self, name: &str) -> Option<&Known> {
        self.known.values().find(|known| known.link.name == name)
    }

    async fn carry(&mut self, link: &Link, mtu: Option<u32>) {
        if let Some(mtu) = mtu.filter(|mtu| *mtu != link.mtu)
            && let Err(error) = links::set_mtu(&self.handle, link.index, mtu).await
        {
            log::warn!("{}: the MTU {mtu} was refused: {error}", link.name);
        }
        if let Err(error) = links::up(&self.handle, link.index).await {
            self.trouble(&link.name, format!("cannot be brought up: {error}"));
        }
    }

    async fn enslave(&mut self, link: &Link, own: protocol::ids::Mac, name: &str) {
        let bond = self.by_name(name).map(|bond| (bond.link.index, bond.link.mac()));
        // Why there is no bond has been said.
        let Some((bond, mac)) = bond else { return };
        if link.controller == Some(bond) {
            return;
        }
        files::no_ipv6(&link.name);
        if self.bootif == Some(own)
            && mac != own
            && let Err(error) = links::set_mac(&self.handle, bond, own).await
        {
            log::warn!("{name}: cannot take the address of {}: {error}", link.name);
        }
        match links::enslave(&self.handle, link.index, bond).await {
            Ok(()) => log::info!("{}: is part of {name}", link.name),
            Err(error) => {
                return self.trouble(&link.name, format!("cannot be part of {name}: {error}"));
            }
        }
        let wish = self.wish.bonds.iter().find(|bond| bond.name == name);
        if let Some(wish) = wish.filter(|bond| bond.primary.as_ref() == Some(&link.name))
            && let Err(error) = links::set_primary(&self.handle, wish, link.index).await
        {
            log::warn!("{name}: {} cannot be preferred: {error}", link.name);
        }
    }

    /// Puts the VLANs on an interface that it is to carry. A bond must have its address first: they take it over.
    async fn make_vlans(&mut self, parent: &Link) {
        let is_bond = self.wish.bonds.iter().any(|bond| bond.name == parent.name);
        if is_bond && !parent.carrier {
            return;
        }
        for vlan in self.wish.vlans.clone() {
            let exists = self.by_name(&vlan.name).is_some();
            if vlan.parent != parent.name || exists || self.troubles.contains_key(&vlan.name) {
                continue;
            }
            match links::make_vlan(&self.handle, &vlan, parent.index).await {
                Ok(()) => {}
                Err(error) if links::exists(&error) => {}
                Err(error) => {
                    let why =
                        format!("the kernel makes no VLAN {} of {}: {error}", vlan.id, vlan.parent);
                    self.trouble(&vlan.name, why);
                }
            }
        }
    }

    /// Says what is waited for, if that has changed.
    pub(super) fn say_waits(&mut self) {
        let mut waiting: Vec<(u32, String)> = Vec::new();
        for known in self.known.values() {
            let name = &known.link.name;
            let empty = self.wish.bonds.iter().find(|bond| {
                let is_slave = |k: &Known| matches!(&k.role, Role::Slave(of) if *of == bond.name);
                bond.name == *name && !self.known.values().any(is_slave)
            });
            let empty = empty.map(|_| "none of its slaves is there yet");
            let Some(why) = empty.or(known.waits.as_deref()) else { continue };
            waiting.push((known.metric, format!("{name}: {why}")));
        }
        waiting.sort();
        let mut said: Vec<String> = waiting.into_iter().map(|(_, text)| text).collect();
        said.extend(self.troubles.iter().map(|(name, why)| format!("{name}: {why}")));
        let vlans = self.wish.vlans.iter().filter(|vlan| {
            self.by_name(&vlan.name).is_none() && !self.troubles.contains_key(&vlan.name)
        });
        said.extend(vlans.map(|vlan| format!("{}: waiting for {}", vlan.name, vlan.parent)));
        for interface in &self.wish.interfaces {
            let Some(name) = interface.which.name.as_ref().filter(|name| !name.ends_with('*'))
            else {
                continue;
            };
            let is_vlan = self.wish.vlans.iter().any(|vlan| vlan.name == *name);
            if self.by_name(name).is_none() && !is_vlan && !self.troubles.contains_key(name) {
                said.push(format!("{name}: there is no such interface yet"));
            }
        }
        if said.is_empty() && self.known.is_empty() {
            said.push("no Ethernet interface yet: is its driver in the image?".to_owned());
        }
        let said = said.join("; ");
        if !said.is_empty() && said != self.said {
            (self.sink)(NetworkEvent::Waiting(said.clone()));
        }
        self.said = said;
    }
}

/// An interface's driver, as sysfs has it.
fn driver(name: &str) -> Option<String> {
    let link = std::fs::read_link(Path::new("/sys/class/net").join(name).join("device/driver"));
    link.ok()?.file_name()?.to_str().map(str::to_owned)
}
