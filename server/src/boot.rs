//! What iPXE is told: the scripts, rendered from the templates that are part of the binary. Pure.

use minijinja::{Environment, UndefinedBehavior, context};
use protocol::boot_args::BootArgs;
use protocol::ids::{Digest, Mac, NodeId};
use protocol::layer0::{self, INITRAMFS, KERNEL};

/// The script that `boot.ipxe` is over TFTP: it only chains to the real one over HTTP.
const CHAIN: &str = include_str!("../templates/chain.ipxe");
/// The script of one node.
const SCRIPT: &str = include_str!("../templates/boot.ipxe");

/// Why a script could not be rendered.
#[derive(Debug, thiserror::Error)]
#[error("the iPXE template {template} could not be rendered")]
pub struct RenderError {
    template: &'static str,
    #[source]
    source: minijinja::Error,
}

/// What a node's script is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script<'a> {
    /// The node.
    pub node: &'a NodeId,
    /// The interface it boots from.
    pub mac: Mac,
    /// Base URL of this server as the node reaches it, without a slash at its end.
    pub url: &'a str,
    /// The Layer0 that it boots; none where `server.layer0_dir` has no manifest: then the node cannot say which one it runs.
    pub layer0: Option<Digest>,
    /// More kernel arguments, `console=ttyS0,115200n8`.
    pub extra: &'a str,
    /// Names of the archives beside the initramfs, in their order ([`crate::overlays`]).
    pub overlays: &'a [&'a str],
}

impl Script<'_> {
    /// The kernel command line that the script carries.
    #[must_use]
    pub fn command_line(&self) -> String {
        let args = BootArgs {
            servers: vec![self.url.to_owned()],
            node: Some(self.node.clone()),
            bootif: Some(self.mac),
            layer0: self.layer0,
            ..BootArgs::default()
        };
        let extra = self.extra.trim();
        if extra.is_empty() { args.to_string() } else { format!("{args} {extra}") }
    }

    /// The script.
    ///
    /// # Errors
    /// If the template does not fit its values, which a test rules out.
    pub fn render(&self) -> Result<String, RenderError> {
        let overlays: Vec<String> = self.overlays.iter().map(|name| (*name).to_owned()).collect();
        let file = |name: &str| match &self.layer0 {
            Some(digest) => layer0::path(digest, name),
            None => format!("/boot/{name}"),
        };
        let values = context! {
            node => self.node.as_str(),
            mac => self.mac.to_string(),
            kernel => file(KERNEL),
            initramfs => file(INITRAMFS),
            url => self.url,
            cmdline => self.command_line(),
            overlays,
        };
        render("boot.ipxe", SCRIPT, values)
    }
}

/// The script that iPXE gets over TFTP as `boot.ipxe`: asks this server for the node's own script, again and again.
///
/// # Errors
/// If the template does not fit its values, which a test rules out.
pub fn render_chain(url: &str) -> Result<String, RenderError> {
    render("chain.ipxe", CHAIN, context! { url })
}

fn render(
    template: &'static str,
    source: &str,
    values: minijinja::Value,
) -> Result<String, RenderError> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let rendered = environment.render_str(source, values);
    // minijinja drops the template's last line break.
    rendered.map(|text| text + "\n").map_err(|source| RenderError { template, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_of_a_node_is_exactly_this() {
        let node = "n1".parse().expect("id");
        let script = Script {
            node: &node,
            mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
            url: "http://10.9.0.1:8080",
            layer0: None,
            extra: "console=ttyS0,115200n8",
            overlays: &[],
        };
        let expected = "\
#!ipxe
# Layercake: the boot script of n1.
echo Layercake: n1 boots from http://10.9.0.1:8080
kernel http://10.9.0.1:8080/boot/vmlinuz?mac=52:54:00:00:00:01 initrd=initramfs.img layercake.server=http://10.9.0.1:8080 layercake.node=n1 BOOTIF=01-52-54-00-00-00-01 console=ttyS0,115200n8 || goto failed
initrd --name initramfs.img http://10.9.0.1:8080/boot/initramfs.img?mac=52:54:00:00:00:01 || goto failed
boot || goto failed
:failed
echo Layercake: n1 could not boot from http://10.9.0.1:8080, trying again in 5 s
sleep 5
reboot
";
        assert_eq!(script.render().expect("render"), expected);

        let names = ["site.cpio.zst", "n1.cpio"];
        let text = Script { overlays: &names, ..script.clone() }.render().expect("render");
        let initrds = " initrd=initramfs.img initrd=site.cpio.zst initrd=n1.cpio layercake.server=";
        assert!(text.contains(initrds), "{text}");
        // In the order in which the kernel is to unpack them.
        let base = "http://10.9.0.1:8080/boot";
        let fetched = format!(
            "initrd --name initramfs.img {base}/initramfs.img?mac=52:54:00:00:00:01 || goto failed\n\
             initrd --name site.cpio.zst {base}/overlays/site.cpio.zst || goto failed\n\
             initrd --name n1.cpio {base}/overlays/n1.cpio || goto failed\nboot || goto failed\n"
        );
        assert!(text.contains(&fetched), "{text}");
        // With a digest, files and command line name the same Layer0.
        let digest = Digest::of(b"b");
        let script = Script { layer0: Some(digest), ..script };
        let base = format!("/boot/layer0/{}/", digest.hex());
        let expected = expected
            .replace("8080/boot/vmlinuz", &format!("8080{base}vmlinuz"))
            .replace("8080/boot/initramfs.img", &format!("8080{base}initramfs.img"))
            .replace(" BOOTIF", &format!(" layercake.layer0={digest} BOOTIF"));
        assert_eq!(script.render().expect("render"), expected);
    }

    #[test]
    fn the_chain_script_is_exactly_this() {
        let expected = "\
#!ipxe
# Layercake: fetches this machine's own boot script.
:again
chain --autofree http://10.9.0.1:8080/boot/ipxe?mac=${netX/mac}&uuid=${uuid} || goto wait
:wait
echo Layercake: http://10.9.0.1:8080 gave no boot script, trying again in 5 s
sleep 5
goto again
";
        assert_eq!(render_chain("http://10.9.0.1:8080").expect("render"), expected);
    }

    #[test]
    fn the_agent_reads_back_what_the_script_says() {
        let node = "n1".parse().expect("id");
        let mac = Mac([2, 0, 0, 0, 0, 9]);
        let script =
            Script { node: &node, mac, url: "http://s:1", layer0: None, extra: " ", overlays: &[] };
        let args = BootArgs::parse(&script.command_line());
        assert_eq!((args.node, args.bootif), (Some(node.clone()), Some(mac)));
        assert_eq!((args.servers, args.problems), (vec!["http://s:1".to_owned()], vec![]));
    }
}
