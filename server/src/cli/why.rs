//! `layercake why`: why a node is not what is wanted of it.

use protocol::ids::NodeId;
use protocol::why::Why;

use super::client::Client;
use super::output::Output;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The node.
    node: NodeId,
}

pub(super) fn run(args: &Args, client: &Client, output: Output) -> anyhow::Result<()> {
    let why: Why = client.get(&format!("/v1/nodes/{}/why", args.node))?;
    output.result(&why, || text(&why))
}

fn text(why: &Why) -> String {
    let mut text = format!("{}\n\n", why.answer);
    let nothing = [String::from("nothing")];
    let wanted = if why.wanted.is_empty() { nothing.as_slice() } else { &why.wanted };
    for (title, lines) in [
        ("wanted", wanted),
        ("seen", &why.seen),
        ("because", &why.because),
        ("next", &why.next),
        ("you can", &why.you_can),
    ] {
        for (index, line) in lines.iter().enumerate() {
            let title = if index == 0 { title } else { "" };
            text.push_str(&format!("{title:<9}{line}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use protocol::why::WhyState;

    use super::*;

    #[test]
    fn the_answer_comes_first_and_each_part_has_its_title_once() {
        let why = Why {
            node: "n1".parse().expect("id"),
            state: WhyState::Waiting,
            answer: "n1 is not as wanted".to_owned(),
            wanted: Vec::new(),
            seen: vec!["last heard of 4 s ago".to_owned(), "agent 0.1.0".to_owned()],
            because: vec!["the registry is away".to_owned()],
            next: vec!["it tries again in 12 s".to_owned()],
            you_can: Vec::new(),
        };
        let expected = "\
n1 is not as wanted

wanted   nothing
seen     last heard of 4 s ago
         agent 0.1.0
because  the registry is away
next     it tries again in 12 s
";
        assert_eq!(text(&why), expected);
    }
}
