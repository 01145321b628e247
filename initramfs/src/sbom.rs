//! What an image is made of, as a bill of materials: CycloneDX 1.5, JSON (<https://cyclonedx.org/docs/1.5/json/>). Pure.
//!
//! No time is in it, and its serial number comes from its contents: the same image has the same bill.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::Digest;
use protocol::layer0::Manifest;
use serde_json::{Value, json};

/// The image itself among the references of a bill.
const IMAGE: &str = "layer0";
/// The agent among them.
const AGENT: &str = "layercake-agent";

/// A crate that is linked into the agent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Crate {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its licence, an SPDX expression (or `MIT/Apache-2.0`, as old crates have it).
    pub licence: Option<String>,
    /// sha256 of what the registry gave, in hexadecimal; none for crates of this workspace.
    pub checksum: Option<String>,
    /// Names and versions of the crates it is linked with.
    pub depends: Vec<(String, String)>,
}

impl Crate {
    /// Package URL (<https://github.com/package-url/purl-spec>), and the reference in a bill.
    fn purl(name: &str, version: &str) -> String {
        // A version's `+` means a space where a URL is read; everything else in names and versions stands for itself.
        format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"))
    }

    fn component(&self) -> Value {
        let Self { name, version, licence, checksum, .. } = self;
        let purl = Self::purl(name, version);
        let mut component = json!({
            "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
        });
        if let Some(licence) = licence {
            // The old way of saying "or".
            let expression = licence.replace(" / ", " OR ").replace('/', " OR ");
            component["licenses"] = json!([{ "expression": expression }]);
        }
        if let Some(checksum) = checksum {
            component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
        }
        component
    }
}

/// The bill of an image, as text. `crates` are the agent's; its own is the one that the bill calls the agent.
///
/// # Errors
/// Never for what serde_json can write.
pub fn render(manifest: &Manifest, crates: &[Crate]) -> Result<String, serde_json::Error> {
    let hash = |digest: &Digest| json!([{ "alg": "SHA-256", "content": digest.hex() }]);
    let kernel = kernel(manifest);
    let kernel_ref = kernel["bom-ref"].clone();
    let mut components = vec![
        json!({
            "type": "application", "bom-ref": AGENT, "name": AGENT, "version": manifest.agent,
            "hashes": hash(&manifest.agent_digest),
        }),
        kernel,
    ];
    let crates: BTreeSet<_> = crates.iter().collect();
    components.extend(crates.iter().map(|it| it.component()));
    let module = |name: &String| format!("module:{name}");
    components.extend(manifest.modules.iter().map(|name| {
        json!({
            "type": "file", "bom-ref": module(name), "name": format!("{name}.ko"),
            "version": manifest.kernel, "description": "kernel module in the initramfs",
        })
    }));
    let mut dependencies = BTreeMap::new();
    let modules: Vec<_> = manifest.modules.iter().map(module).collect();
    let mut parts = vec![json!(AGENT), kernel_ref];
    parts.extend(modules.iter().map(|it| json!(it)));
    dependencies.insert(IMAGE.to_owned(), parts);
    dependencies.insert(AGENT.to_owned(), own_crates(&crates));
    for it in &crates {
        let on = it.depends.iter().map(|(name, version)| json!(Crate::purl(name, version)));
        dependencies.insert(Crate::purl(&it.name, &it.version), on.collect());
    }
    let dependencies: Vec<_> =
        dependencies.iter().map(|(of, on)| json!({ "ref": of, "dependsOn": on })).collect();
    let files: Vec<_> = manifest
        .artifacts
        .iter()
        .map(|it| json!({ "type": "file", "name": it.name, "hashes": hash(&it.digest) }))
        .collect();
    let mut bill = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": {
            "type": "firmware", "bom-ref": IMAGE, "name": manifest.name, "version": manifest.version,
            "components": files,
        }},
        "components": components,
        "dependencies": dependencies,
    });
    bill["serialNumber"] = json!(serial(&Digest::of(&serde_json::to_vec(&bill)?)));
    Ok(format!("{:#}\n", bill))
}

/// What the agent depends on in a bill: its crates that no other one of them brings.
fn own_crates(crates: &BTreeSet<&Crate>) -> Vec<Value> {
    let brought: BTreeSet<_> = crates.iter().flat_map(|it| &it.depends).collect();
    crates
        .iter()
        .filter(|it| !brought.contains(&(it.name.clone(), it.version.clone())))
        .map(|it| json!(Crate::purl(&it.name, &it.version)))
        .collect()
}

/// The kernel: `PACKAGE VERSION sha256:HEX` where it came from a package, `FILE sha256:HEX` where it was given.
fn kernel(manifest: &Manifest) -> Value {
    let words: Vec<_> = manifest.kernel_source.split(' ').collect();
    let licences = json!([{ "expression": "GPL-2.0-only WITH Linux-syscall-note" }]);
    let digest = words.last().and_then(|word| word.strip_prefix("sha256:"));
    let hashes = digest.map(|hex| json!([{ "alg": "SHA-256", "content": hex }]));
    let mut component = json!({
        "type": "operating-system", "bom-ref": "kernel", "name": "linux",
        "version": manifest.kernel, "licenses": licences,
        "description": format!("flavour {}, {}", manifest.flavour, manifest.kernel_source),
    });
    if let [package, version, _] = words.as_slice() {
        // The distribution's `+` and `~` (an epoch's colon stands for itself), as a package URL has them.
        let version = version.replace('+', "%2B");
        component["purl"] = json!(format!("pkg:deb/debian/{package}@{version}?arch=amd64"));
    }
    if let Some(hashes) = hashes {
        component["hashes"] = hashes;
    }
    component
}

/// A UUID of version 8 (RFC 9562 section 5.8), out of a digest.
fn serial(digest: &Digest) -> String {
    let hex = digest.hex();
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!(
        "urn:uuid:{}-{}-8{}-8{}-{}",
        part(0, 8),
        part(8, 12),
        part(13, 16),
        part(17, 20),
        part(20, 32)
    )
}

/// A small image's bill, for tests.
#[doc(hidden)]
#[must_use]
pub fn sample() -> (Manifest, Vec<Crate>) {
    let manifest = Manifest {
        name: "layer0".to_owned(),
        version: "0.1.0".to_owned(),
        kernel: "6.12.1-cloud".to_owned(),
        kernel_source: format!("linux-image-cloud 6.12.1+deb12-1~x {}", Digest::of(b"k")),
        flavour: "cloud".to_owned(),
        agent: "0.1.0".to_owned(),
        agent_digest: Digest::of(b"agent"),
        modules: vec!["overlay".to_owned()],
        artifacts: vec![protocol::layer0::Artifact {
            name: "vmlinuz".to_owned(),
            digest: Digest::of(b"k"),
            size: 1,
        }],
        inputs: None,
        lacks: Vec::new(),
        firmware: Vec::new(),
    };
    let one = |name: &str, licence: &str, depends: &[(&str, &str)]| Crate {
        name: name.to_owned(),
        version: "1.0.0+x".to_owned(),
        licence: Some(licence.to_owned()),
        checksum: Some(Digest::of(name.as_bytes()).hex()),
        depends: depends.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
    };
    (manifest, vec![one("b", "MIT/Apache-2.0", &[]), one("a", "MIT", &[("b", "1.0.0+x")])])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_names_agent_kernel_crates_and_modules_and_how_they_hang_together() {
        let (manifest, crates) = sample();
        let text = render(&manifest, &crates).unwrap();
        let mut turned = crates.clone();
        turned.reverse();
        assert_eq!(render(&manifest, &turned).unwrap(), text, "order does not matter");
        let bill: Value = serde_json::from_str(&text).unwrap();
        let find = |name: &str| {
            let all = bill["components"].as_array().unwrap();
            all.iter().find(|it| it["name"] == name).unwrap().clone()
        };
        assert_eq!(find("b")["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(find("a")["purl"], "pkg:cargo/a@1.0.0%2Bx");
        let purl = "pkg:deb/debian/linux-image-cloud@6.12.1%2Bdeb12-1~x?arch=amd64";
        assert_eq!(find("linux")["purl"], purl);
        assert_eq!(find("overlay.ko")["version"], "6.12.1-cloud");
        let on = |of: &str| {
            let all = bill["dependencies"].as_array().unwrap();
            all.iter().find(|it| it["ref"] == of).unwrap()["dependsOn"].clone()
        };
        assert_eq!(on("layer0"), json!(["layercake-agent", "kernel", "module:overlay"]));
        assert_eq!(on("layercake-agent"), json!(["pkg:cargo/a@1.0.0%2Bx"]));
        assert_eq!(on("pkg:cargo/a@1.0.0%2Bx"), json!(["pkg:cargo/b@1.0.0%2Bx"]));
    }

    #[test]
    fn every_reference_is_one_component_and_the_serial_number_follows_the_contents() {
        let (mut manifest, crates) = sample();
        let bill = |manifest: &Manifest| -> Value {
            serde_json::from_str(&render(manifest, &crates).unwrap()).unwrap()
        };
        let first = bill(&manifest);
        let mut refs: Vec<_> = first["components"].as_array().unwrap().iter().collect();
        refs.push(&first["metadata"]["component"]);
        let refs: Vec<_> = refs.iter().map(|it| it["bom-ref"].as_str().unwrap()).collect();
        assert_eq!(refs.iter().collect::<BTreeSet<_>>().len(), refs.len());
        for dependency in first["dependencies"].as_array().unwrap() {
            let on = dependency["dependsOn"].as_array().unwrap();
            for it in on.iter().chain([&dependency["ref"]]) {
                assert!(refs.contains(&it.as_str().unwrap()), "{it}");
            }
        }
        manifest.agent_digest = Digest::of(b"another");
        assert_ne!(bill(&manifest)["serialNumber"], first["serialNumber"]);
        let serial = first["serialNumber"].as_str().unwrap();
        assert_eq!((serial.len(), serial.as_bytes()[23], serial.as_bytes()[28]), (45, b'8', b'8'));
    }
}
