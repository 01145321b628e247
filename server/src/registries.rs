//! The registry table of the config (`[[registries]]`): what this server uses when it looks ImageSets up elsewhere, and what it
//! tells nodes in their desired documents.
//!
//! It is never stored with a node's document, so neither the inventory's listings nor its database have a secret in them.
//! Whoever can ask for a node's desired document gets what nodes are told: credentials for nodes should only be able to pull.

use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use imagebuilder::client::{Credentials, Options};
use protocol::node::Desired;
use protocol::reference::Reference;
use protocol::registries::{
    self, MAX_TABLE_BYTES, RegistryEntry, RegistrySource, RegistryTable, TableError,
};

/// What is known of registries.
#[derive(Debug, Clone, Default)]
pub struct Known {
    table: RegistryTable,
    for_nodes: Vec<RegistryEntry>,
    /// Another one each time the server starts: nodes then look at the table again.
    tag: Option<String>,
}

impl Known {
    /// What the config says, with the files that it names.
    ///
    /// # Errors
    /// One sentence for each problem; none repeats a secret.
    pub fn load(sources: &[RegistrySource]) -> Result<Self, Vec<String>> {
        let (mut table, mut for_nodes) = (RegistryTable::default(), Vec::new());
        let mut problems = Vec::new();
        for source in sources {
            match source.load(&mut read) {
                Ok(entry) => {
                    if source.nodes {
                        for_nodes.push(entry.clone());
                    }
                    table.registries.push(entry);
                }
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() {
            problems = table.problems();
        }
        let size = serde_json::to_vec(&table).map_or(usize::MAX, |bytes| bytes.len());
        if size > MAX_TABLE_BYTES {
            problems.push(TableError::TooLarge(size).to_string());
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let random = std::hash::RandomState::new().build_hasher().finish();
        let tag = (!for_nodes.is_empty()).then(|| format!("{random:016x}"));
        Ok(Self { table, for_nodes, tag })
    }

    /// Changes with the table; none where nodes are told nothing.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// A node's document as the node gets it.
    #[must_use]
    pub fn tell(&self, desired: Desired) -> Desired {
        let (registries, registries_tag) = (self.for_nodes.clone(), self.tag.clone());
        Desired { registries, registries_tag, ..desired }
    }

    /// How the registry of a reference is spoken to from here: itself, not a mirror.
    #[must_use]
    pub fn client(&self, reference: &Reference) -> (Reference, Options) {
        let endpoints = self.table.endpoints(reference);
        let origin = endpoints.into_iter().find(|endpoint| !endpoint.is_mirror);
        let origin = origin.unwrap_or_else(|| registries::Endpoint::of(reference));
        let credentials = origin.credentials.map(|known| match known {
            registries::Credentials::Basic { username, password } => {
                Credentials::new(&username, password.reveal())
            }
            registries::Credentials::Token(token) => Credentials::of_bearer(token.reveal()),
            registries::Credentials::Identity(token) => Credentials::of_token(token.reveal()),
        });
        let ca_pem = origin.ca.into_iter().map(String::into_bytes).collect();
        (origin.reference, Options { credentials, ca_pem, ..Options::default() })
    }
}

fn read(path: &str) -> Result<String, String> {
    use std::io::Read;
    let mut text = String::new();
    let file = std::fs::File::open(Path::new(path)).map_err(|error| error.to_string())?;
    let most = u64::try_from(registries::MAX_CA_BYTES).unwrap_or(u64::MAX);
    file.take(most.saturating_add(1))
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(toml: &str) -> Vec<RegistrySource> {
        #[derive(serde::Deserialize)]
        struct Sources {
            registries: Vec<RegistrySource>,
        }
        toml::from_str::<Sources>(toml).expect("toml").registries
    }

    #[test]
    fn nodes_are_told_what_is_theirs_and_once() {
        let known = Known::load(&sources(
            "[[registries]]\nhost = \"r:1\"\nmirrors = [\"http://m:2\"]\n\
             [[registries]]\nhost = \"own:1\"\nnodes = false\nusername = \"ann\"\npassword = \"hunter2\"\n",
        ));
        let known = known.expect("known");
        let plain = crate::desired::first("n1".parse().expect("id"));
        let told = known.tell(plain.clone());
        let hosts: Vec<&str> = told.registries.iter().map(|it| it.host.as_str()).collect();
        assert_eq!(hosts, ["r:1"]);
        assert!(told.registries_tag.is_some() && told.registries_tag.as_deref() == known.tag());
        let nothing = Known::default();
        assert_eq!(nothing.tell(plain.clone()), plain);
        assert_eq!(nothing.tag(), None);
        let (reference, options) = known.client(&"own:1/a".parse().expect("reference"));
        assert_eq!(reference.to_string(), "own:1/a");
        let credentials = options.credentials.expect("credentials");
        assert_eq!((credentials.user.as_str(), credentials.password.as_str()), ("ann", "hunter2"));
        assert!(!format!("{known:?}").contains("hunter2"));
    }

    #[test]
    fn every_problem_is_named_and_no_secret() {
        let wrong = Known::load(&sources(
            "[[registries]]\nhost = \"r:1\"\nca = [\"/nonexistent/ca.pem\"]\n\
             [[registries]]\nhost = \"s:1\"\nusername = \"ann\"\ntoken = \"hunter2\"\n",
        ));
        let wrong = wrong.expect_err("wrong").join("\n");
        assert!(wrong.contains("registry r:1: /nonexistent/ca.pem: No such file"), "{wrong}");
        assert!(wrong.contains("registry s:1: username and password come together"), "{wrong}");
        assert!(!wrong.contains("hunter2"), "{wrong}");
        let text = "[[registries]]\nhost = \"r\"\npassword = 424242\n";
        #[derive(Debug, serde::Deserialize)]
        struct Sources {
            #[serde(rename = "registries")]
            _registries: Vec<RegistrySource>,
        }
        let error = toml::from_str::<Sources>(text).expect_err("a number");
        assert!(!error.message().contains("4242"), "{}", error.message());
    }
}
