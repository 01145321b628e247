//! A disk with a GUID partition table and one EFI system partition on it (UEFI 2.10 chapter 5).

use flate2::Crc;
use protocol::ids::Digest;

use super::{SECTOR, put};

/// First sector of the partition: 1 MiB, where every tool puts it.
pub const START: usize = 2048;
/// Partition entries, and the bytes of each.
const ENTRIES: usize = 128;
const ENTRY: usize = 128;
/// Sectors that the entries take.
const ENTRY_SECTORS: usize = ENTRIES * ENTRY / SECTOR;
/// `C12A7328-F81F-11D2-BA4B-00A0C93EC93B`, an EFI system partition, as it stands on disk.
const EFI_SYSTEM: [u8; 16] = [
    0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
];

/// Bytes of boot code that fit in front of the protective record's table.
pub const BOOT_CODE: usize = 440;
/// The attribute that tells BIOS boot code which partition to start (UEFI 2.10 table 5.8, bit 2).
const LEGACY_BOOT: u64 = 1 << 2;

/// The disk with this volume as its one partition. Its GUIDs come from the volume: the same volume gives the same disk.
///
/// `boot_code` is what BIOS firmware starts, at most [`BOOT_CODE`] bytes (the rest is left out); it is told by an attribute that
/// the partition is its own. None where only UEFI is to boot it.
#[must_use]
pub fn disk(name: &str, volume: &[u8], boot_code: Option<&[u8]>) -> Vec<u8> {
    let sectors = volume.len().div_ceil(SECTOR);
    let last_usable = START + sectors - 1;
    let total = last_usable + 1 + ENTRY_SECTORS + 1;
    let mut disk = vec![0; total * SECTOR];
    put(&mut disk, START * SECTOR, volume);
    if let Some(code) = boot_code {
        put(&mut disk, 0, code.get(..code.len().min(BOOT_CODE)).unwrap_or_default());
    }
    protective(&mut disk, total);
    let seed = Digest::of(volume).hex();
    let mut entries = entries(name, last_usable, &guid(&seed, 0));
    if boot_code.is_some() {
        put(&mut entries, 48, &LEGACY_BOOT.to_le_bytes());
    }
    let disk_guid = guid(&seed, 1);
    let backup = total - 1;
    for (own, other, at) in [(1, backup, 2), (backup, 1, last_usable + 1)] {
        put(&mut disk, at * SECTOR, &entries);
        let header = header(own, other, at, last_usable, &disk_guid, crc(&entries));
        put(&mut disk, own * SECTOR, &header);
    }
    disk
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// A GUID of version 4 out of a digest's hexadecimal text.
fn guid(seed: &str, index: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (at, byte) in bytes.iter_mut().enumerate() {
        let from = index * 32 + at * 2;
        *byte =
            seed.get(from..from + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()).unwrap_or(0);
    }
    bytes[7] = (bytes[7] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    bytes
}

/// The record that keeps old tools from taking the disk for an empty one.
fn protective(disk: &mut [u8], total: usize) {
    let mut record = [0; 16];
    put(&mut record, 1, &[0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff]);
    put(&mut record, 8, &1_u32.to_le_bytes());
    put(&mut record, 12, &number(total - 1).to_le_bytes());
    put(disk, 446, &record);
    put(disk, 510, &[0x55, 0xaa]);
}

fn entries(name: &str, last: usize, guid: &[u8; 16]) -> Vec<u8> {
    let mut entries = vec![0; ENTRIES * ENTRY];
    put(&mut entries, 0, &EFI_SYSTEM);
    put(&mut entries, 16, guid);
    put(&mut entries, 32, &(START as u64).to_le_bytes());
    put(&mut entries, 40, &(last as u64).to_le_bytes());
    let units: Vec<u8> = name.encode_utf16().take(36).flat_map(u16::to_le_bytes).collect();
    put(&mut entries, 56, &units);
    entries
}

fn header(
    own: usize,
    other: usize,
    entries: usize,
    last: usize,
    guid: &[u8; 16],
    sum: u32,
) -> [u8; SECTOR] {
    const SIZE: usize = 92;
    let mut header = [0; SECTOR];
    put(&mut header, 0, b"EFI PART");
    put(&mut header, 8, &0x0001_0000_u32.to_le_bytes());
    put(&mut header, 12, &number(SIZE).to_le_bytes());
    for (at, value) in [(24, own), (32, other), (40, 2 + ENTRY_SECTORS), (48, last), (72, entries)]
    {
        put(&mut header, at, &(value as u64).to_le_bytes());
    }
    put(&mut header, 56, guid);
    put(&mut header, 80, &number(ENTRIES).to_le_bytes());
    put(&mut header, 84, &number(ENTRY).to_le_bytes());
    put(&mut header, 88, &sum.to_le_bytes());
    let own_sum = crc(header.get(..SIZE).unwrap_or_default());
    put(&mut header, 16, &own_sum.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_begins_at_one_mebibyte_and_both_headers_point_at_each_other() {
        let disk = disk("Layer0", &[7; 10 * SECTOR], Some(&[9; 600]));
        assert_eq!(
            disk.get(439..442),
            Some([9, 0, 0].as_slice()),
            "code ends where the table begins"
        );
        assert_eq!(disk.get(2 * SECTOR + 48), Some(&4), "the partition is the one to boot");
        assert_eq!(disk.get(START * SECTOR..START * SECTOR + 3), Some([7; 3].as_slice()));
        let number = |sector: usize, at: usize| {
            let at = sector * SECTOR + at;
            u64::from_le_bytes(disk[at..at + 8].try_into().unwrap())
        };
        let last = (disk.len() / SECTOR - 1) as u64;
        assert_eq!((number(1, 24), number(1, 32)), (1, last));
        assert_eq!(
            (number(disk.len() / SECTOR - 1, 24), number(disk.len() / SECTOR - 1, 32)),
            (last, 1)
        );
        assert_eq!((number(1, 40), number(1, 48)), (34, 2057));
    }
}
