//! Makes small ELF files for tests: modules that drive nothing and programs that do not run. Not a linker.

/// A relocatable file whose only section of interest is `.modinfo`, with these entries.
#[must_use]
pub fn module(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut modinfo = Vec::new();
    for (key, value) in entries {
        modinfo.extend_from_slice(format!("{key}={value}\0").as_bytes());
    }
    let names: &[u8] = b"\0.modinfo\0.shstrtab\0";
    let mut file = header(1);
    let modinfo_at = file.len();
    file.extend_from_slice(&modinfo);
    let names_at = file.len();
    file.extend_from_slice(names);
    let sections_at = file.len();
    file.extend_from_slice(&[0; 64]);
    file.extend_from_slice(&section(1, modinfo_at, modinfo.len()));
    file.extend_from_slice(&section(10, names_at, names.len()));
    put(&mut file, 0x28, &(sections_at as u64).to_le_bytes());
    put(&mut file, 0x3c, &3_u16.to_le_bytes());
    put(&mut file, 0x3e, &2_u16.to_le_bytes());
    file
}

/// A program with this interpreter and these libraries; with neither it is a static one.
#[must_use]
pub fn program(interpreter: Option<&str>, needed: &[&str]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut dynamic = Vec::new();
    for name in needed {
        dynamic.extend_from_slice(&1_u64.to_le_bytes());
        dynamic.extend_from_slice(&(strings.len() as u64).to_le_bytes());
        strings.extend_from_slice(name.as_bytes());
        strings.push(0);
    }
    let interpreter = interpreter.map(|name| format!("{name}\0"));
    let count = 2 + u16::from(interpreter.is_some());
    let mut file = header(3);
    let strings_at = file.len() + 56 * usize::from(count);
    let dynamic_at = strings_at + strings.len();
    for pair in [[5, 0x1000 + strings_at as u64], [0, 0]] {
        pair.iter().for_each(|value| dynamic.extend_from_slice(&value.to_le_bytes()));
    }
    let interpreter_at = dynamic_at + dynamic.len();
    file.extend_from_slice(&segment(1, 0, 0x1000, interpreter_at));
    file.extend_from_slice(&segment(2, dynamic_at, 0x1000 + dynamic_at, dynamic.len()));
    if let Some(name) = &interpreter {
        let address = 0x1000 + interpreter_at;
        file.extend_from_slice(&segment(3, interpreter_at, address, name.len()));
    }
    file.extend_from_slice(&strings);
    file.extend_from_slice(&dynamic);
    file.extend_from_slice(interpreter.unwrap_or_default().as_bytes());
    put(&mut file, 0x20, &64_u64.to_le_bytes());
    put(&mut file, 0x38, &count.to_le_bytes());
    file
}

fn header(kind: u16) -> Vec<u8> {
    let mut header = vec![0; 64];
    put(&mut header, 0, super::MAGIC);
    put(&mut header, 0x10, &kind.to_le_bytes());
    put(&mut header, 0x12, &super::EM_X86_64.to_le_bytes());
    header
}

fn section(name: u32, offset: usize, size: usize) -> [u8; 64] {
    let mut raw = [0; 64];
    put(&mut raw, 0, &name.to_le_bytes());
    put(&mut raw, 24, &(offset as u64).to_le_bytes());
    put(&mut raw, 32, &(size as u64).to_le_bytes());
    raw
}

fn segment(kind: u32, offset: usize, address: usize, size: usize) -> [u8; 56] {
    let mut raw = [0; 56];
    put(&mut raw, 0, &kind.to_le_bytes());
    put(&mut raw, 8, &(offset as u64).to_le_bytes());
    put(&mut raw, 16, &(address as u64).to_le_bytes());
    put(&mut raw, 32, &(size as u64).to_le_bytes());
    raw
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}
