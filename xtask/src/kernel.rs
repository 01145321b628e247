//! `cargo xtask kernel`: a kernel of our own from the distribution's source, kept by the hash of its inputs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use initramfs::kernel::fragments::{self, Flavours};
use initramfs::kernel::kconfig;
use initramfs::kernel::source::{self, Built, Recipe};

use crate::build_image::{root, target_dir};

/// Builds a kernel from the distribution's source and the fragments in kernel-config.
///
/// What was built is kept by the hash of its inputs (source, fragments, compiler): a second run with the same inputs takes no
/// time. `cargo xtask build-image --flavour virt` does this by itself.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Args {
    /// Which kernel: a flavour of kernel-config/flavours.toml
    #[arg(default_value = "virt")]
    flavour: String,
    /// Merge this fragment of kernel-config/fragments after those of the flavour (repeatable): `debug`
    #[arg(long, value_name = "NAME")]
    with: Vec<String>,
    /// Look for a newer source although one is in the cache
    #[arg(long)]
    update: bool,
    /// Copy vmlinuz and config here
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print where it is and its key as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `cargo xtask kernel`.
///
/// # Errors
/// There is no such flavour, a tool is missing, a symbol is lost, or the source does not build.
pub(crate) fn run(args: &Args) -> Result<()> {
    let built = built(&args.flavour, &args.with, args.update)?;
    let image = built.dir.join("vmlinuz");
    if let Some(out) = &args.out {
        fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
        for name in ["vmlinuz", "config"] {
            let from = built.dir.join(name);
            fs::copy(&from, out.join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    let size =
        fs::metadata(&image).with_context(|| format!("cannot read {}", image.display()))?.len();
    if args.json {
        let json = serde_json::json!({
            "flavour": args.flavour, "key": built.key, "cached": built.cached, "vmlinuz": image, "size": size,
        });
        println!("{json:#}");
    } else {
        let from = if built.cached { "from the cache" } else { "built" };
        println!(
            "{} {size} bytes, key {}, {from} in {:.1} s",
            image.display(),
            built.key,
            built.took.as_secs_f64()
        );
    }
    Ok(())
}

/// A kernel of this flavour, built now or before, with progress on stderr.
///
/// # Errors
/// As [`run`].
pub(crate) fn built(flavour: &str, with: &[String], update: bool) -> Result<Built> {
    let dir = root().join("kernel-config");
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let flavours: Flavours = fragments::parse_flavours(&read("flavours.toml")?)
        .context("in kernel-config/flavours.toml")?;
    let Some(chosen) = flavours.flavour.get(flavour) else {
        let known: Vec<_> = flavours.flavour.keys().map(String::as_str).collect();
        bail!(
            "there is no kernel flavour {flavour:?}: kernel-config/flavours.toml has {}",
            known.join(", ")
        );
    };
    let texts = chosen
        .fragments
        .iter()
        .chain(with)
        .map(|name| Ok((name.clone(), read(&format!("fragments/{name}.config"))?)))
        .collect::<Result<Vec<_>>>()?;
    let required = kconfig::parse_required(&read("required.toml")?)
        .context("in kernel-config/required.toml")?;
    // Another set of fragments is another kernel: its objects lie apart.
    let name = std::iter::once(flavour)
        .chain(with.iter().map(String::as_str))
        .collect::<Vec<_>>()
        .join("-");
    let recipe = Recipe {
        flavour: name,
        wishes: fragments::merge(&texts)?,
        packages: flavours.source,
        required,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        update,
    };
    // A cache of its own: images are built while a kernel compiles.
    let cache = target_dir(&root()).join("layer0-cache/kernel");
    Ok(source::build(&recipe, &cache, &|text| eprintln!("kernel: {text}"))?)
}
