//! Which container an operator means. Pure: the node's last report and a name in, one container or a sentence out.

use protocol::channel::{ChannelWish, ContainerPath};
use protocol::ids::NodeId;
use protocol::node::Observed;

/// Why a container cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// No container is named, and one is needed.
    #[error("a container must be named; node {node} has {has}")]
    Missing {
        /// The node.
        node: NodeId,
        /// What it has.
        has: String,
    },
    /// There is none of that name.
    #[error("node {node} has no container `{path}`; it has {has}")]
    Unknown {
        /// The node.
        node: NodeId,
        /// The name.
        path: ContainerPath,
        /// What it has.
        has: String,
    },
    /// There are several.
    #[error("several sets of node {node} have a container `{name}`; say {}", .candidates.join(" or "))]
    Ambiguous {
        /// The node.
        node: NodeId,
        /// The name.
        name: String,
        /// `SET/NAME` of each.
        candidates: Vec<String>,
    },
    /// The node has not reported what it has.
    #[error("node {0} has not reported its containers yet; name the set as well (SET/NAME)")]
    NotReported(NodeId),
}

/// The container, with its set; none for the node's own log.
///
/// A name with its set is taken for logs as it is: the log of a container that is gone is still there.
///
/// # Errors
/// [`ResolveError`] says what there is.
pub fn resolve(
    node: &NodeId,
    observed: Option<&Observed>,
    path: Option<&ContainerPath>,
    wish: &ChannelWish,
) -> Result<Option<ContainerPath>, ResolveError> {
    if matches!(wish, ChannelWish::NodeLog { .. }) {
        return Ok(None);
    }
    let sets = observed.map_or(&[][..], |observed| &observed.imagesets);
    let all: Vec<ContainerPath> = sets
        .iter()
        .flat_map(|set| {
            set.containers.iter().map(|container| ContainerPath {
                set: Some(set.name.clone()),
                name: container.name.clone(),
            })
        })
        .collect();
    let has = || match all.is_empty() {
        true => "none".to_owned(),
        false => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let Some(path) = path else {
        return match &all[..] {
            [only] => Ok(Some(only.clone())),
            _ => Err(ResolveError::Missing { node: node.clone(), has: has() }),
        };
    };
    if path.set.is_some()
        && (all.contains(path) || observed.is_none() || matches!(wish, ChannelWish::Logs { .. }))
    {
        return Ok(Some(path.clone()));
    }
    if observed.is_none() {
        return Err(ResolveError::NotReported(node.clone()));
    }
    let meant: Vec<&ContainerPath> = all
        .iter()
        .filter(|one| one.name == path.name && (path.set.is_none() || path.set == one.set))
        .collect();
    match &meant[..] {
        [] => Err(ResolveError::Unknown { node: node.clone(), path: path.clone(), has: has() }),
        [only] => Ok(Some((*only).clone())),
        several => Err(ResolveError::Ambiguous {
            node: node.clone(),
            name: path.name.to_string(),
            candidates: several.iter().map(ToString::to_string).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use protocol::channel::ExecWish;

    use super::*;

    const LOGS: ChannelWish = ChannelWish::Logs { follow: false, tail: None };

    fn exec() -> ChannelWish {
        let argv = vec!["sh".to_owned()];
        ChannelWish::Exec(ExecWish { argv, env: Vec::new(), user: None, terminal: None })
    }

    /// A node with `hello/hello`, and with more sets that have a container of the same name.
    fn observed(more: &[&str]) -> Observed {
        let golden = include_str!("../../../protocol/golden/v1/observed.json");
        let mut observed: Observed = serde_json::from_str(golden).expect("golden");
        for name in more {
            let mut set = observed.imagesets[0].clone();
            set.name = name.parse().expect("name");
            observed.imagesets.push(set);
        }
        observed
    }

    #[track_caller]
    fn check(observed: Option<&Observed>, path: &str, wish: &ChannelWish, expected: &str) {
        let node = "n1".parse().expect("node");
        let path = (!path.is_empty()).then(|| path.parse().expect("path"));
        let text = match resolve(&node, observed, path.as_ref(), wish) {
            Ok(found) => found.map_or("-".to_owned(), |found| found.to_string()),
            Err(error) => error.to_string(),
        };
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn a_name_is_enough_where_it_means_one_container() {
        let one = observed(&[]);
        check(Some(&one), "hello", &LOGS, "hello/hello");
        check(Some(&one), "hello/hello", &exec(), "hello/hello");
        check(Some(&one), "", &exec(), "hello/hello");
        let two = observed(&["other"]);
        let both =
            "several sets of node n1 have a container `hello`; say hello/hello or other/hello";
        check(Some(&two), "hello", &exec(), both);
        check(Some(&two), "other/hello", &exec(), "other/hello");
        check(Some(&two), "", &LOGS, "must be named; node n1 has hello/hello, other/hello");
    }

    #[test]
    fn what_is_not_there_is_told_with_what_is() {
        let one = observed(&[]);
        check(Some(&one), "web", &LOGS, "no container `web`; it has hello/hello");
        check(Some(&one), "old/web", &exec(), "no container `old/web`; it has hello/hello");
        check(Some(&one), "old/web", &LOGS, "old/web");
        check(None, "web", &LOGS, "has not reported");
        check(None, "old/web", &exec(), "old/web");
    }

    #[test]
    fn the_node_s_own_log_is_of_no_container() {
        let wish = ChannelWish::NodeLog { follow: false, tail: None };
        check(None, "", &wish, "-");
    }
}
