//! Kernel modules: what the hardware asks for is loaded, at start and whenever something is plugged in.
//!
//! Three parts: [`index`] decides (pure: names and aliases to an ordered list of files), [`load`] acts (files into the
//! kernel), [`uevent`] listens to the kernel. [`start`] puts them together so that no device falls between the look around
//! and the listening: the socket is bound first. There are no waits: a module that brings a device to light causes an
//! event, which loads the next.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::identity::{self, uptime_ms};
use crate::paths::MODULES_LOAD;
use load::{Loader, ModuleError};
use uevent::{Event, Listener};

pub mod index;
pub mod load;
pub mod uevent;

/// Where sysfs shows devices.
const DEVICES: &str = "/sys/devices";
/// Deepest directory below it that is looked into, and how many directories.
const MAX_DEPTH: usize = 24;
const MAX_DIRS: usize = 200_000;

/// Loads what the present devices ask for and what `/etc/layercake/modules` names, and goes on doing so for new devices in
/// a thread of its own. Every event, a device's own among them, goes to `sink` after its module has been loaded.
///
/// A kernel without `/lib/modules/RELEASE` has everything built in: that is no error, events are still passed on. Modules that
/// do not load are logged, with the reason, and not fatal.
///
/// # Errors
/// [`ModuleError::Listen`] if the kernel's events cannot be heard, [`ModuleError::Index`] if the index cannot be read.
pub fn start(sink: impl Fn(&Event) + Send + 'static) -> Result<JoinHandle<()>, ModuleError> {
    let begin = uptime_ms();
    let listener = Listener::bind().map_err(ModuleError::Listen)?;
    let loader = Arc::new(Mutex::new(Loader::open(&identity::release())?));
    let thread = {
        let loader = Arc::clone(&loader);
        let watch = move || watch(&listener, &loader, &sink);
        let builder = std::thread::Builder::new().name("uevents".to_owned());
        builder.spawn(watch).map_err(ModuleError::Listen)?
    };
    coldplug(&loader, Path::new(DEVICES));
    load_required(&loader, Path::new(MODULES_LOAD));
    let loaded = with(&loader, |loader| loader.loaded());
    log::info!("{loaded} kernel modules loaded in {} ms", uptime_ms().saturating_sub(begin));
    Ok(thread)
}

/// Loads the drivers of the network adapters that are there now, and nothing else: those on PCI first, which bring virtio's to
/// light. Problems are left to [`start`], which finds the same devices again.
pub fn load_network_drivers() {
    let Ok(loader) = Loader::open(&identity::release()) else { return };
    if loader.has_none() {
        return;
    }
    let loader = Mutex::new(loader);
    for bus in ["pci", "virtio"] {
        let Ok(devices) = fs::read_dir(Path::new("/sys/bus").join(bus).join("devices")) else {
            continue;
        };
        for device in devices.flatten() {
            let alias = fs::read_to_string(device.path().join("modalias")).unwrap_or_default();
            if is_network(alias.trim()) {
                load_alias(&loader, alias.trim());
            }
        }
    }
}

/// Loads what the kernel asks for on behalf of a program, a file system's module at the first mount of its kind: containers
/// have no CAP_SYS_MODULE, and need none. The result is the process's exit code.
///
/// Protocol families (`net-pf-…`) are refused: every program may ask for those, and an old one is a way into the kernel.
/// Whoever needs one names it in `/etc/layercake/modules`.
#[must_use]
pub fn load_for_kernel(request: &str) -> i32 {
    if request.starts_with("net-pf-") {
        return 1;
    }
    let loaded = Loader::open(&identity::release()).and_then(|mut loader| loader.load(request));
    i32::from(loaded.is_err())
}

fn with<T>(loader: &Mutex<Loader>, work: impl FnOnce(&mut Loader) -> T) -> T {
    work(&mut loader.lock().unwrap_or_else(PoisonError::into_inner))
}

fn load_logged(loader: &Mutex<Loader>, name: &str) {
    if let Err(error) = with(loader, |loader| loader.load(name)) {
        log::warn!("{error}");
    }
}

/// Loads the modules that a file names, one a line, `#` begins a remark. A missing file names none.
pub fn load_required(loader: &Mutex<Loader>, list: &Path) {
    match fs::read_to_string(list) {
        Ok(text) => index::names(&text).for_each(|name| load_logged(loader, name)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => log::warn!("{}: {error}", list.display()),
    }
}

/// Loads the modules for every device below this directory, network adapters first: their answers take longest, and come
/// while the others are loaded. The lock is taken a device at a time.
pub fn coldplug(loader: &Mutex<Loader>, devices: &Path) {
    let mut aliases: Vec<String> = aliases_below(devices).into_iter().collect();
    aliases.sort_by_key(|alias| !is_network(alias));
    for alias in aliases {
        load_alias(loader, &alias);
    }
}

/// Whether a modalias is of a network adapter: PCI class 02 (kernel `drivers/pci/pci-sysfs.c`), or virtio device 1
/// (`linux/virtio_ids.h`).
fn is_network(alias: &str) -> bool {
    (alias.starts_with("pci:") && alias.contains("bc02")) || alias.starts_with("virtio:d00000001")
}

fn load_alias(loader: &Mutex<Loader>, alias: &str) {
    match with(loader, |loader| loader.load(alias)) {
        // Most devices need nothing, or something that is not in this image.
        Ok(_) | Err(ModuleError::Unknown { .. }) => {}
        Err(error) => log::warn!("{error} (for device {alias})"),
    }
}

/// Every different `modalias` below a directory; links are not followed.
fn aliases_below(devices: &Path) -> BTreeSet<String> {
    devices_below(devices).into_iter().map(|(_, alias)| alias).collect()
}

/// Every device below a directory that asks for a driver, with what it asks by; links are not followed.
pub(crate) fn devices_below(devices: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut pending = vec![(devices.to_owned(), 0_usize)];
    let mut visited = 0_usize;
    while let Some((dir, depth)) = pending.pop() {
        visited = visited.saturating_add(1);
        if visited > MAX_DIRS {
            log::warn!("more than {MAX_DIRS} directories below {}", devices.display());
            break;
        }
        // A device may vanish while it is looked at.
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && depth < MAX_DEPTH {
                pending.push((entry.path(), depth.saturating_add(1)));
            } else if kind.is_file()
                && entry.file_name() == "modalias"
                && let Ok(text) = fs::read_to_string(entry.path())
                && !text.trim().is_empty()
            {
                found.push((dir.clone(), text.trim().to_owned()));
            }
        }
    }
    found
}

fn watch(listener: &Listener, loader: &Mutex<Loader>, sink: &impl Fn(&Event)) {
    loop {
        match listener.next() {
            Ok(Some(event)) => {
                if event.action == "add"
                    && let Some(alias) = &event.modalias
                {
                    load_alias(loader, alias);
                }
                sink(&event);
            }
            Ok(None) => {}
            // The kernel dropped events: look at everything once more.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                log::warn!("kernel events were lost, looking at all devices again");
                coldplug(loader, Path::new(DEVICES));
            }
            Err(error) => {
                log::error!("kernel events can no longer be heard: {error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_found_below_without_following_links() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("pci0/0000:00:01.0/virtio0");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("modalias"), "virtio:d00000001v00001AF4\n").unwrap();
        fs::write(dir.path().join("pci0/modalias"), "virtio:d00000001v00001AF4\n").unwrap();
        fs::write(dir.path().join("pci0/0000:00:01.0/modalias"), "\n").unwrap();
        std::os::unix::fs::symlink(dir.path(), deep.join("loop")).unwrap();
        let aliases = aliases_below(dir.path());
        assert_eq!(aliases.into_iter().collect::<Vec<_>>(), ["virtio:d00000001v00001AF4"]);
    }

    #[test]
    fn network_adapters_are_told_by_class_and_by_virtio_id() {
        for (alias, expected) in [
            ("pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00", true),
            ("pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01", false),
            ("virtio:d00000001v00001AF4", true),
            ("virtio:d00000002v00001AF4", false),
            ("acpi:PNP0303:", false),
        ] {
            assert_eq!(is_network(alias), expected, "{alias}");
        }
    }

    #[test]
    fn a_missing_list_and_an_unknown_device_are_no_trouble() {
        let dir = tempfile::tempdir().unwrap();
        let loader = Mutex::new(Loader::open_at(dir.path()).unwrap());
        load_required(&loader, &dir.path().join("absent"));
        coldplug(&loader, dir.path());
        assert_eq!(with(&loader, |loader| loader.loaded()), 0);
    }
}
