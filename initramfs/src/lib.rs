//! Builds Layer0's image: a kernel, and one initramfs that holds the agent and the modules it needs.
//!
//! | module | what it holds |
//! |---|---|
//! | [`image`] | the whole build, from a [`image::Config`] to `vmlinuz`, `initramfs.img` and `manifest.json` |
//! | [`tree`] | the file tree that goes into the archive. Pure |
//! | [`registries`] | the registry table, from TOML to what the agent reads |
//! | [`site`] | the site's archive beside the image: keys, configuration, a rescue shell, ssh |
//! | [`overlay`] | what the operator adds: directories and CA certificates, read from disk |
//! | [`archive`] | the tree as newc cpio, and read back. Pure |
//! | [`compress`] | how that is compressed, and what the kernel needs to unpack it. Pure |
//! | [`compare`] | where two images differ, down to the entry of an archive. Pure |
//! | [`sbom`] | what an image is made of, as CycloneDX. Pure |
//! | [`elf`] | a small bounded ELF reader: how the agent is linked, what a module says of itself. Pure |
//! | [`disk`] | disks that firmware boots from: FAT32 and GPT. Pure |
//! | [`pe`] | sections added to an EFI program, and read back. Pure |
//! | [`uki`] | kernel, initramfs and command line as one EFI program. Pure |
//! | [`modules`] | which modules go in, and the index files the agent reads. Pure but for [`modules::files`] |
//! | [`kernel`] | the kernel: from a Debian package, or from files that were given |
//!
//! The crate prints nothing and reads no environment: whoever calls it passes a [`Notice`] to hear what is going on. It
//! does not build the agent either; that is cargo's work, in xtask.

pub mod archive;
pub mod compare;
pub mod compress;
pub mod disk;
pub mod elf;
pub mod image;
pub mod kernel;
pub mod modules;
pub mod overlay;
pub mod pe;
pub mod registries;
pub mod sbom;
pub mod site;
pub mod tree;
pub mod uki;

/// Hears of each step that takes time, one line a call.
pub type Notice<'a> = &'a dyn Fn(&str);
