//! A kernel with an initramfs and a command line inside: the `efi` form. The kept objects are linked again, nothing but the few
//! files that know of either is compiled. It knows nothing of what the initramfs holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use protocol::ids::Digest;

use super::super::{Record, bzimage, fragments, read_json};
use super::make::Make;
use super::{FORM, Made, Package, Recipe, SourceError, Wish, io_error, store, unpacked};
use crate::Notice;

/// The archive's name among the objects. The kernel's Makefile takes a single `.cpio` as it is; a relative name is no path of
/// this machine.
const ARCHIVE: &str = "layercake.cpio";
/// `COMMAND_LINE_SIZE` of arch/x86/include/asm/setup.h is 2048 with the final zero.
const COMMAND_LINE_LIMIT: usize = 2047;

/// Links the kernel that [`super::build`] put into `built` once more, with this initramfs and this command line inside; the boot
/// loader's own command line is appended to it, so that its keys win. Gives a bzImage, which firmware starts as an EFI program.
///
/// `initramfs` is a newc archive, best not compressed: the kernel's own compression then takes it as well. Objects that are gone
/// are compiled again, with progress; the result is kept by the hash of all inputs.
///
/// # Errors
/// The kernel does not say how it was made, the command line does not fit, the source cannot be had, or make fails.
pub fn relink(
    built: &Path,
    initramfs: &[u8],
    command_line: &str,
    jobs: usize,
    notice: Notice<'_>,
) -> Result<Vec<u8>, SourceError> {
    let no_recipe = || SourceError::NoRecipe(built.to_owned());
    let made: Made = read_json(&built.join("recipe.json")).map_err(|_| no_recipe())?;
    let record: Record = read_json(&built.join("record.json")).map_err(|_| no_recipe())?;
    let cache = built.parent().ok_or_else(no_recipe)?;
    let mut wishes = fragments::merge(&[("recipe".to_owned(), made.wishes)])?;
    wishes.extend(inside(quoted(command_line)?));
    let key = key(&made.key, initramfs, &wishes);
    let prefix = format!("relinked-{}-", made.flavour);
    let path = cache.join(format!("{prefix}{key}"));
    if let Some(image) = kept(&path) {
        return Ok(image);
    }
    super::make::check_tools()?;
    let objects = store::Objects::take(cache, &made.flavour, notice)?;
    if let Some(image) = kept(&path) {
        return Ok(image);
    }
    if objects.dir.join("vmlinux.o").exists() {
        notice(&format!("linking kernel {} {} with its initramfs inside", made.flavour, made.key));
    } else {
        notice(&format!("the objects of kernel {} are gone: compiling it again", made.flavour));
    }
    let (flavour, packages, required) = (made.flavour, vec![record.package.clone()], Vec::new());
    let recipe = Recipe { flavour, wishes, packages, required, jobs, update: false };
    let Record { package: name, version, digest, .. } = record;
    let package = Package { name, version, digest, size: 0, depends: String::new() };
    let source = unpacked(&package, cache, notice)?;
    let archive = objects.dir.join(ARCHIVE);
    fs::create_dir_all(&objects.dir).map_err(io_error(&objects.dir))?;
    fs::write(&archive, initramfs).map_err(io_error(&archive))?;
    let make = Make { source, objects: &objects, recipe: &recipe };
    make.configure(notice)?;
    let image = make.link(notice)?;
    let work = objects.work()?;
    let fresh = work.path().join("image");
    fs::write(&fresh, &image)
        .and_then(|()| fs::rename(&fresh, &path))
        .and_then(|()| store::prune(cache, &prefix))
        .map_err(io_error(&path))?;
    Ok(image)
}

/// What is asked for beyond the kernel's own recipe. The archive is not compressed by itself: the whole kernel is, which is smaller.
fn inside(line: String) -> [(String, Wish); 4] {
    [
        ("CONFIG_INITRAMFS_SOURCE", format!("\"{ARCHIVE}\"")),
        ("CONFIG_INITRAMFS_COMPRESSION_NONE", "y".to_owned()),
        ("CONFIG_CMDLINE_BOOL", "y".to_owned()),
        ("CONFIG_CMDLINE", line),
    ]
    .map(|(name, value)| (name.to_owned(), Wish { value, fragment: "efi".to_owned() }))
}

fn key(built: &str, initramfs: &[u8], wishes: &BTreeMap<String, Wish>) -> String {
    let digest = Digest::of(initramfs).to_string();
    let parts = [FORM, built, &digest, &fragments::render(wishes)];
    Digest::of(parts.join("\n").as_bytes()).hex().chars().take(16).collect()
}

/// An image that was linked before.
fn kept(path: &Path) -> Option<Vec<u8>> {
    if !store::used(path) {
        return None;
    }
    fs::read(path).ok().filter(|image| bzimage::release(image).is_some())
}

/// A command line as kconfig has texts. Its files are read by make as well, which would take a `$` for a variable of its own.
fn quoted(line: &str) -> Result<String, SourceError> {
    let plain = |byte: u8| (byte == b' ' || byte.is_ascii_graphic()) && byte != b'$';
    if line.len() > COMMAND_LINE_LIMIT || !line.bytes().all(plain) {
        return Err(SourceError::CommandLine { limit: COMMAND_LINE_LIMIT });
    }
    Ok(format!("\"{}\"", line.replace('\\', "\\\\").replace('"', "\\\"")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::source::write;

    #[test]
    fn a_command_line_is_quoted_as_kconfig_does_it_or_refused() {
        assert_eq!(quoted("a=\"b c\" d\\e #").unwrap(), "\"a=\\\"b c\\\" d\\\\e #\"");
        assert_eq!(quoted("").unwrap(), "\"\"");
        for line in ["a\nb", "a=$(x)", "é", "\t", &"x".repeat(COMMAND_LINE_LIMIT + 1)] {
            assert!(quoted(line).unwrap_err().to_string().contains("2047"), "{line:?}");
        }
    }

    #[test]
    fn a_kernel_that_was_linked_so_before_comes_from_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let built = cache.path().join("built-virt-1");
        fs::create_dir(&built).unwrap();
        let (flavour, key) = ("virt".to_owned(), "1".to_owned());
        let error = relink(&built, b"cpio", "a", 1, &|_| ()).unwrap_err().to_string();
        assert!(error.contains("does not say how"), "{error}");
        write(&built.join("recipe.json"), &Made { flavour, key, wishes: String::new() }).unwrap();
        let record = Record {
            package: "linux-source-6.12".to_owned(),
            version: "1".to_owned(),
            digest: Digest::of(b"x"),
            release: "6.12.1".to_owned(),
        };
        write(&built.join("record.json"), &record).unwrap();
        let wishes = inside("\"a\"".to_owned()).into_iter().collect();
        let key = super::key("1", b"cpio", &wishes);
        let path = cache.path().join(format!("relinked-virt-{key}"));
        let image = bzimage::fake("6.12.1 (x) #1");
        fs::write(path, &image).unwrap();
        assert_eq!(relink(&built, b"cpio", "a", 1, &|_| ()).unwrap(), image);
    }
}
