//! What the command line says of the node's memory: how much of it the store may fill (`layercake.store=`), and how much of it swaps
//! into itself, compressed (`layercake.zram=`, the kernel's `Documentation/admin-guide/blockdev/zram.rst`). Off unless asked for: a
//! node that swaps is slower where nobody expects it.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use protocol::boot_args::Amount;
use rustix::mount::MountFlags;

use crate::identity;
use crate::modules::load::Loader;
use crate::sys::swap::swap_on;

/// The first device that the module makes.
const DEVICE: &str = "/dev/zram0";
const SYSFS: &str = "/sys/block/zram0";
/// Size of a page on x86-64, in bytes: what swap counts in.
const PAGE: usize = 4096;
/// It goes before any swap on disk.
const PRIORITY: u16 = 100;

/// Memory that the kernel manages, in bytes.
#[must_use]
pub fn total() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// Sets how much memory the tmpfs at `store` may fill.
///
/// # Errors
/// A sentence.
pub fn limit_store(amount: Amount, store: &Path) -> Result<(), String> {
    let option = CString::new(format!("size={}", amount.of(total())));
    let option = option.map_err(|error| error.to_string())?;
    let done = rustix::mount::mount_remount(store, MountFlags::empty(), &*option);
    done.map_err(|error| format!("layercake.store={amount}: remount {}: {error}", store.display()))
}

/// Makes compressed swap of this size, unless an agent before this one has.
///
/// # Errors
/// A sentence.
pub fn start_zram(amount: Amount) -> Result<(), String> {
    if zram() > 0 {
        return Ok(());
    }
    let fail = |what: &str, error: String| format!("layercake.zram={amount}: {what}: {error}");
    if !Path::new(SYSFS).exists() {
        let loaded = Loader::open(&identity::release()).and_then(|mut it| it.load("zram"));
        loaded.map_err(|error| fail("build-image --with zram puts it in", error.to_string()))?;
    }
    let pages = amount.of(total()) / PAGE as u64;
    let size = pages.saturating_mul(PAGE as u64);
    let header = swap_header(pages).ok_or_else(|| fail("size", "too small".to_owned()))?;
    let swap = || -> io::Result<()> {
        fs::write(Path::new(SYSFS).join("disksize"), size.to_string())?;
        OpenOptions::new().write(true).open(DEVICE)?.write_all(&header)?;
        swap_on(c"/dev/zram0", PRIORITY)
    };
    swap().map_err(|error| fail(DEVICE, error.to_string()))?;
    // Pages beside the one that is wanted cost as much as it, there is no disk's head that passes by.
    if let Err(error) = fs::write("/proc/sys/vm/page-cluster", "0") {
        log::debug!("page-cluster: {error}");
    }
    log::info!("{} MB of compressed swap in memory", size >> 20);
    Ok(())
}

/// Size of the compressed swap that is in use, in bytes; 0 without.
#[must_use]
pub fn zram() -> u64 {
    zram_of(&fs::read_to_string("/proc/swaps").unwrap_or_default())
}

/// The size out of the text of `/proc/swaps` (proc(5)), which is in KiB.
fn zram_of(swaps: &str) -> u64 {
    let line = swaps.lines().find_map(|line| line.strip_prefix(DEVICE));
    let size = line.and_then(|line| line.split_whitespace().nth(1));
    size.and_then(|size| size.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

/// The first page of swap space with so many pages, as mkswap(8) writes it (`union swap_header` in the kernel's
/// `include/linux/swap.h`); none for less than two pages, or more than it can say.
fn swap_header(pages: u64) -> Option<[u8; PAGE]> {
    const VERSION_AT: usize = 1024;
    const LAST_PAGE_AT: usize = 1028;
    const MAGIC: &[u8] = b"SWAPSPACE2";
    let last = u32::try_from(pages.checked_sub(1)?).ok().filter(|last| *last > 0)?;
    let mut page = [0; PAGE];
    let mut put = |at: usize, bytes: &[u8]| {
        let place = page.get_mut(at..at.checked_add(bytes.len())?)?;
        place.copy_from_slice(bytes);
        Some(())
    };
    put(VERSION_AT, &1_u32.to_le_bytes())?;
    put(LAST_PAGE_AT, &last.to_le_bytes())?;
    put(PAGE.checked_sub(MAGIC.len())?, MAGIC)?;
    Some(page)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_header_is_what_mkswap_writes_but_for_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("swap");
        let pages = 64_u64;
        fs::write(&file, vec![0; PAGE * 64]).unwrap();
        let said = Command::new("/sbin/mkswap").arg(&file).output().expect("mkswap of util-linux");
        assert!(said.status.success(), "{said:?}");
        let mut theirs = fs::read(&file).unwrap();
        theirs.truncate(PAGE);
        // Its UUID: who mounts by it needs one, the kernel does not.
        theirs[1036..1052].fill(0);
        assert_eq!(swap_header(pages).unwrap().as_slice(), theirs);
    }

    #[test]
    fn sizes_that_cannot_be_said_have_no_header() {
        for pages in [0, 1, 1 << 40] {
            assert!(swap_header(pages).is_none(), "{pages}");
        }
    }

    #[test]
    fn the_swap_in_use_is_found_among_others() {
        let swaps = "Filename\tType\tSize\tUsed\tPriority\n/dev/sda2 partition 100 0 -2\n\
            /dev/zram0                              partition\t262140\t\t0\t\t100\n";
        assert_eq!(zram_of(swaps), 262_140 * 1024);
        assert_eq!(zram_of("Filename\tType\n"), 0);
    }
}
