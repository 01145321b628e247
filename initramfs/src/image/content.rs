//! What every image holds: directories, device nodes, the agent, the modules with their index, and what the image says of itself. Pure.

use protocol::layer0::Manifest;

use crate::modules::{Module, Selection, index};
use crate::tree::{Kind, Tree, TreeError};

/// Where modules lie: everything below changes with the kernel, not with the agent.
pub(super) const MODULES: &str = "lib/modules";
/// Directories every image has, with their modes.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("etc/layercake", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];
/// Device nodes the kernel and the agent need before devtmpfs is mounted: path, mode, major and minor.
const DEVICES: &[(&str, u32, (u32, u32))] =
    &[("dev/console", 0o600, (5, 1)), ("dev/null", 0o666, (1, 3))];
/// What the image says of itself.
const ABOUT: &str = "etc/layercake/layer0.json";
/// Names of modules the agent loads at start.
const MODULES_LOAD: &str = "etc/layercake/modules";

/// What an image is put together from.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The agent, static.
    pub agent: Vec<u8>,
    /// The chosen modules.
    pub selection: &'a Selection,
    /// Their files, by path below `lib/modules/VERSION`, as the selection has them.
    pub modules: Vec<(String, Vec<u8>)>,
    /// The kernel's `modules.builtin`.
    pub builtin: Vec<u8>,
    /// What the image says of itself; its artifacts are not in it.
    pub about: &'a Manifest,
}

/// Puts the tree of an image together, without what the operator adds. Pure.
///
/// # Errors
/// A module's path cannot stand in a tree.
pub fn assemble(parts: Parts<'_>) -> Result<Tree, TreeError> {
    let mut tree = Tree::new();
    for (path, mode) in DIRECTORIES {
        tree.directory(path, *mode)?;
    }
    for (path, mode, device) in DEVICES {
        tree.char_device(path, *mode, *device)?;
    }
    let Parts { agent, selection, modules, builtin, about } = parts;
    tree.file("init", 0o755, agent)?;
    let base = format!("lib/modules/{}", about.kernel);
    for (path, bytes) in modules {
        tree.file(&format!("{base}/{path}"), 0o644, bytes)?;
    }
    for (name, text) in [
        ("modules.alias", index::alias(selection).into_bytes()),
        ("modules.builtin", builtin),
        ("modules.dep", index::dep(selection).into_bytes()),
        ("modules.softdep", index::softdep(selection).into_bytes()),
    ] {
        tree.file(&format!("{base}/{name}"), 0o644, text)?;
    }
    tree.file(MODULES_LOAD, 0o644, index::load(selection).into_bytes())?;
    tree.file(ABOUT, 0o644, about_text(about).into_bytes())?;
    Ok(tree)
}

/// Takes out the modules that an operator's tree has brought another file for, uncompressed, and names that one in the index, unless
/// the operator has brought an index as well.
pub(super) fn give_way(
    tree: &mut Tree,
    selection: &mut Selection,
    release: &str,
) -> Result<(), TreeError> {
    let base = format!("{MODULES}/{release}");
    let index_path = format!("{base}/modules.dep");
    let ours = Kind::File(index::dep(selection).into_bytes());
    let other = |module: &&Module| tree.get(&format!("{base}/{}", module.path)).is_some();
    let packed = selection.modules.values().filter(|it| selection.compressed.contains(&it.name));
    let replaced: Vec<_> = packed.filter(other).cloned().collect();
    for module in &replaced {
        tree.remove_file(&format!("{base}/{}", selection.place(module)));
        selection.compressed.remove(&module.name);
    }
    if !replaced.is_empty() && tree.get(&index_path).is_some_and(|node| node.kind == ours) {
        tree.file(&index_path, 0o644, index::dep(selection).into_bytes())?;
    }
    Ok(())
}

fn about_text(about: &Manifest) -> String {
    // The agent knows its own version, and given as a file it is not known here.
    let Manifest { version, kernel, kernel_source, flavour, agent_digest, .. } = about;
    let agent_digest = agent_digest.to_string();
    let about = serde_json::json!({
        "version": version, "kernel": kernel, "kernel_source": kernel_source,
        "flavour": flavour, "agent_digest": agent_digest,
    });
    format!("{about:#}\n")
}
