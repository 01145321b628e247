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
/// What was built is kept by the hash of its inputs (source, fragments, compiler) in $LAYERCAKE_CACHE/kernel, or below
/// $XDG_CACHE_HOME/layercake or ~/.cache/layercake, for all clones of this user: a second run with the same inputs takes no time. `cargo xtask build-image --flavour virt` does this by itself.
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
    let recipe = recipe(flavour, with, update)?;
    let built = source::build(&recipe, &cache(), &|text| eprintln!("kernel: {text}"))?;
    let from = if built.cached { "from the cache" } else { "built" };
    eprintln!("kernel: {} {}, {from}", recipe.flavour, built.key);
    Ok(built)
}

/// The kernel part of the gate: every flavour's configuration is whole, and the kernel for virtual machines is at hand.
///
/// # Errors
/// As [`run`].
pub(crate) fn gate() -> Result<()> {
    let notice = |text: &str| eprintln!("kernel: {text}");
    let flavours = flavours()?;
    let plain = flavours.flavour.keys().map(|name| (name.as_str(), Vec::new()));
    for (name, with) in plain.chain([(GATE, vec!["debug".to_owned()])]) {
        let recipe = recipe(name, &with, false)?;
        let config = source::configuration(&recipe, &cache(), &notice)
            .with_context(|| format!("flavour {name}"))?;
        let count = |value: &str| config.lines().filter(|line| line.ends_with(value)).count();
        eprintln!(
            "kernel: the configuration of {} is whole: {} symbols built in, {} modules",
            recipe.flavour,
            count("=y"),
            count("=m")
        );
    }
    built(GATE, &[], false).map(drop)
}

/// The flavour that the gate compiles.
const GATE: &str = "virt";

fn read(name: &str) -> Result<String> {
    let path = root().join("kernel-config").join(name);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn flavours() -> Result<Flavours> {
    fragments::parse_flavours(&read("flavours.toml")?).context("in kernel-config/flavours.toml")
}

fn recipe(flavour: &str, with: &[String], update: bool) -> Result<Recipe> {
    let flavours = flavours()?;
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
    Ok(Recipe {
        flavour: name,
        wishes: fragments::merge(&texts)?,
        packages: flavours.source,
        required: kconfig::of_flavour(required, flavour),
        jobs: jobs(),
        update,
    })
}

/// Compilers at once: one for each processor.
pub(crate) fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Where kernels are kept: with the user, so that all clones share them, else below `target`.
fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|it| !it.is_empty()).map(PathBuf::from);
    let names = ["LAYERCAKE_CACHE", "XDG_CACHE_HOME", "HOME"];
    let [own, caches, home] = names.map(set);
    cache_dir(own, caches, home)
        .unwrap_or_else(|| target_dir(&root()).join("layer0-cache"))
        .join("kernel")
}

/// `$LAYERCAKE_CACHE`, or the user's cache as the XDG Base Directory Specification has it (a relative path does not count).
fn cache_dir(
    own: Option<PathBuf>,
    caches: Option<PathBuf>,
    home: Option<PathBuf>,
) -> Option<PathBuf> {
    let absolute = |path: Option<PathBuf>| path.filter(|path| path.is_absolute());
    let own = own.map(|path| root().join(path));
    let users = absolute(caches).or_else(|| absolute(home).map(|home| home.join(".cache")));
    own.or_else(|| users.map(|path| path.join("layercake")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let dir = |own: &str, caches: &str, home: &str| {
            let [own, caches, home] = [own, caches, home]
                .map(|text| Some(text).filter(|text| !text.is_empty()).map(PathBuf::from));
            cache_dir(own, caches, home)
        };
        assert_eq!(dir("/a", "/b", "/c"), Some("/a".into()));
        assert_eq!(dir("a", "", ""), Some(root().join("a")));
        assert_eq!(dir("", "/b", "/c"), Some("/b/layercake".into()));
        assert_eq!(dir("", "b", "/c"), Some("/c/.cache/layercake".into()));
        assert_eq!(dir("", "", ""), None);
    }

    #[test]
    fn every_flavour_has_its_fragments_and_what_it_must_have() {
        for name in flavours().unwrap().flavour.keys() {
            let recipe = recipe(name, &["debug".to_owned()], false).unwrap();
            assert_eq!(recipe.flavour, format!("{name}-debug"));
            assert!(recipe.wishes.len() > 100 && recipe.required.len() > 50, "{name}");
        }
        let error = recipe("other", &[], false).unwrap_err().to_string();
        assert!(error.ends_with("has hw, virt"), "{error}");
    }
}
