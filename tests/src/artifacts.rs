//! Where the things under test were built to. Nothing is built here: `cargo xtask demo` and `cargo xtask test` build,
//! and name other places by the environment.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The `layercake` binary.
pub const ENV_BIN: &str = "LAYERCAKE_BIN";
/// The directory of the Layer0 artifacts (vmlinuz, initramfs.img, manifest.json).
pub const ENV_LAYER0: &str = "LAYERCAKE_LAYER0";
/// The directory of the built example programs.
pub const ENV_EXAMPLES: &str = "LAYERCAKE_EXAMPLES";

/// Where the site's archive with a rescue shell and ssh is, and the keys.
pub const SITE_DIR: &str = "target/site";
/// The archive's name.
pub const SITE_OVERLAY: &str = "site.cpio.zst";
/// The private key that it lets in, and one that it does not.
pub const SITE_KEYS: [&str; 2] = ["key", "other"];

/// Where the program of a time server that is not ours is.
pub const CHRONYD: &str = "target/peers/chronyd";
/// Where Layer0 with the modules of network storage is.
pub const STORAGE_DIR: &str = "target/storage";
/// Where Layer0 with our own kernel for virtual machines is.
pub const VIRT_DIR: &str = "target/virt";
/// Where Layer0 with a kernel for real machines is.
pub const GENERIC_DIR: &str = "target/generic";
/// Where Layer0 with the oldest kernel that is tested is.
pub const FLOOR_DIR: &str = "target/floor";
/// Where the EFI programs are.
pub const EFI_DIR: &str = "target/efi";
/// Their command line: it finds the lab's server, as its first node.
pub const EFI_COMMAND_LINE: &str =
    "console=ttyS0,115200n8 panic=10 layercake.server=http://10.9.0.1:8080 layercake.node=n1";
/// Command line of the forms that carry one and boot on any machine of the lab: it runs a set without a server.
pub const FORMS_COMMAND_LINE: &str =
    "console=ttyS0,115200n8 panic=10 layercake.imageset=http://10.9.0.1:8080/hello:1";
/// The form that has all inside the kernel, as it is and signed with the test key.
pub const KERNEL_FORM: &str = "layer0-kernel.efi";
/// Where it is.
pub const KERNEL_FORM_DIR: &str = "target/forms-virt";
/// Where they are.
pub const FORMS_DIR: &str = "target/forms";

/// The built things.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// The `layercake` binary.
    pub bin: PathBuf,
    /// The directory of the Layer0 artifacts.
    pub layer0: PathBuf,
    /// The directory of the built example programs.
    pub examples: PathBuf,
}

impl Artifacts {
    /// The built things, all of them there.
    ///
    /// # Errors
    /// What is not there, and what builds it.
    pub fn find() -> Result<Self> {
        let place = |variable: &str, default: &str| {
            std::env::var_os(variable).map_or_else(
                || workspace_root().join(default),
                |value| workspace_root().join(value),
            )
        };
        let found = Self {
            bin: place(ENV_BIN, "target/debug/layercake"),
            layer0: place(ENV_LAYER0, "out/layer0"),
            examples: place(ENV_EXAMPLES, "target/examples"),
        };
        for file in [found.bin.clone(), found.kernel(), found.initramfs(), found.hello()] {
            if !file.exists() {
                bail!("{} is not built: run `cargo xtask test`", file.display());
            }
        }
        Ok(found)
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.layer0.join("vmlinuz")
    }

    /// Layer0 as one EFI program, signed with the test key or not. `cargo xtask test qemu` builds both.
    ///
    /// # Errors
    /// That it is not there, and what builds it.
    pub fn efi(signed: bool) -> Result<PathBuf> {
        let dir = workspace_root().join(EFI_DIR).join(if signed { "signed" } else { "plain" });
        let file = dir.join("layer0.efi");
        if !file.exists() {
            bail!("{} is not built: run `cargo xtask test qemu`", file.display());
        }
        Ok(file)
    }

    /// A form of Layer0 by its file name, with [`FORMS_COMMAND_LINE`]. `cargo xtask test qemu` builds it.
    ///
    /// # Errors
    /// That it is not there, and what builds it.
    pub fn form(name: &str) -> Result<PathBuf> {
        let file = workspace_root().join(FORMS_DIR).join(name);
        if !file.exists() {
            bail!("{} is not built: run `cargo xtask test qemu`", file.display());
        }
        Ok(file)
    }

    /// Layer0 inside a kernel of ours, with [`FORMS_COMMAND_LINE`], signed or not. `cargo xtask test qemu` builds both.
    ///
    /// # Errors
    /// That it is not there, and what builds it.
    pub fn kernel_form(signed: bool) -> Result<PathBuf> {
        let dir = workspace_root().join(KERNEL_FORM_DIR);
        let file = dir.join(if signed { "signed" } else { "plain" }).join(KERNEL_FORM);
        if !file.exists() {
            bail!("{} is not built: run `cargo xtask test qemu`", file.display());
        }
        Ok(file)
    }

    /// chronyd, taken out of its package by `cargo xtask test qemu`.
    ///
    /// # Errors
    /// That it is not there, and what brings it.
    pub fn chronyd() -> Result<PathBuf> {
        let file = workspace_root().join(CHRONYD);
        if !file.exists() {
            bail!("{} is not there: run `cargo xtask test qemu`", file.display());
        }
        Ok(file)
    }

    /// The site's archive with a rescue shell and ssh, the private key that it lets in, and another one.
    /// `cargo xtask test qemu` builds it.
    ///
    /// # Errors
    /// That it is not there, and what builds it.
    pub fn site() -> Result<(PathBuf, [PathBuf; 2])> {
        let dir = workspace_root().join(SITE_DIR);
        let overlay = dir.join(SITE_OVERLAY);
        if !overlay.exists() {
            bail!("{} is not built: run `cargo xtask test qemu`", overlay.display());
        }
        Ok((overlay, SITE_KEYS.map(|name| dir.join(name))))
    }

    /// The same with the Layer0 that has the modules of network storage. `cargo xtask test qemu` builds it.
    ///
    /// # Errors
    /// As [`Self::with_layer0`].
    pub fn with_storage(self) -> Result<Self> {
        self.with_layer0(STORAGE_DIR)
    }

    /// The same with the Layer0 in this directory of the workspace. `cargo xtask test qemu` builds it.
    ///
    /// # Errors
    /// That it is not there, and what builds it.
    pub fn with_layer0(mut self, dir: &str) -> Result<Self> {
        self.layer0 = workspace_root().join(dir);
        if !self.initramfs().exists() {
            bail!("{} is not built: run `cargo xtask test qemu`", self.initramfs().display());
        }
        Ok(self)
    }

    /// The same with the Layer0 that has the oldest kernel that is tested, with the drivers of `tests/facts/floor.json`. `cargo xtask test qemu` builds it.
    ///
    /// # Errors
    /// As [`Self::with_layer0`].
    pub fn with_floor(self) -> Result<Self> {
        self.with_layer0(FLOOR_DIR)
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.layer0.join("initramfs.img")
    }

    /// The static program of the `hello` example.
    #[must_use]
    pub fn hello(&self) -> PathBuf {
        self.examples.join("hello")
    }
}

/// The root of the workspace: the directory over this crate's.
#[must_use]
pub fn workspace_root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_path_buf()
}

/// The description of version `version` of the example ImageSet `name`.
#[must_use]
pub fn example(name: &str, version: &str) -> PathBuf {
    workspace_root().join("examples").join(name).join(version).join("imageset.toml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_root_holds_this_crate() {
        assert!(workspace_root().join("tests/Cargo.toml").exists());
    }
}
