//! Staging against a small server: what is fetched, what is refused, and what the kernel says to a file that is no kernel.

use std::cell::RefCell;
use std::os::unix::fs::PermissionsExt;

use protocol::layer0::{archive_statement, signature_text};
use protocol::node::Layer0Archive;
use protocol::signature::PublicKey;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

use super::*;
use crate::pull::fake::{Answer, Fake, Fault};

const AGENT_SCRIPT: &[u8] = b"#!/bin/sh\ntest \"$1\" = --version\n";

struct World {
    fake: Fake,
    stager: Stager,
    wanted: DesiredLayer0,
    dir: tempfile::TempDir,
}

impl World {
    /// A build whose kernel is none, with this agent.
    fn new(how: Layer0How, agent: &[u8]) -> Self {
        let files =
            [(KERNEL, b"kernel".to_vec()), (INITRAMFS, vec![7; 9]), (AGENT, agent.to_vec())];
        let artifacts: Vec<_> = files
            .iter()
            .map(|(name, bytes)| {
                serde_json::json!({"name": name, "digest": Digest::of(bytes), "size": bytes.len()})
            })
            .collect();
        let manifest = serde_json::json!({ "artifacts": artifacts, "later": 1 }).to_string();
        let digest = Digest::of(manifest.as_bytes());
        let fake = Fake::start();
        for (name, bytes) in files {
            fake.add(&path(&digest, name), Answer::ok(bytes));
        }
        fake.add(&path(&digest, MANIFEST), Answer::ok(manifest.into_bytes()));
        let dir = tempfile::tempdir().expect("directory");
        let stager = Stager {
            transport: Transport::new(Path::new("/nonexistent")).expect("transport"),
            servers: vec![fake.url()],
            policy: Policy::Unsigned,
            agents: dir.path().join("agents"),
            turn: Mutex::default(),
        };
        let wanted = DesiredLayer0 {
            digest,
            how,
            boot_id: None,
            request: 1,
            agent: Some(Digest::of(agent)),
            force: false,
            archives: Vec::new(),
        };
        Self { fake, stager, wanted, dir }
    }

    fn stage(&self) -> Result<Way, Failure> {
        self.stager.stage(&self.wanted, &|_| ())
    }

    #[track_caller]
    fn fails(&self, last: bool, part: &str) {
        let failure = self.stage().expect_err(part);
        assert!(failure.why.contains(part), "{failure:?}");
        assert_eq!(failure.last, last, "{failure:?}");
    }
}

#[test]
fn an_agent_is_put_where_it_can_be_started_and_others_go() {
    let world = World::new(Layer0How::Agent, AGENT_SCRIPT);
    std::fs::create_dir(world.dir.path().join("agents")).expect("directory");
    std::fs::write(world.dir.path().join("agents/old"), "x").expect("old");
    let path = world.dir.path().join("agents").join(Digest::of(AGENT_SCRIPT).hex());
    let said = RefCell::new(Vec::new());
    let way = world.stager.stage(&world.wanted, &|text| said.borrow_mut().push(text));
    assert_eq!(way, Ok(Way::Agent(path.clone())));
    assert_eq!(said.into_inner(), ["fetching layercake-agent, 0 kB"]);
    assert_eq!(std::fs::read(&path).expect("agent"), AGENT_SCRIPT);
    assert_eq!(path.metadata().expect("agent").permissions().mode() & 0o777, 0o755);
    assert_eq!(std::fs::read_dir(world.dir.path().join("agents")).expect("dir").count(), 1);
    // Once more, over what is there.
    assert_eq!(world.stage(), Ok(Way::Agent(path)));
}

#[test]
fn an_agent_that_does_not_run_here_is_not_taken() {
    for script in ["#!/bin/sh\nexit 3\n", "#!/nonexistent\n", "no program at all"] {
        let world = World::new(Layer0How::Agent, script.as_bytes());
        world.fails(true, "the new agent does not run here");
        assert!(
            !world.dir.path().join("agents").join(Digest::of(script.as_bytes()).hex()).exists()
        );
    }
}

#[test]
fn a_file_that_is_another_is_refused_and_asked_for_again() {
    for (file, fault, part) in [
        (MANIFEST, Fault::Corrupt(3), "has digest"),
        (AGENT, Fault::Corrupt(3), "came in place of"),
        (AGENT, Fault::Longer(5), "or more with"),
        (AGENT, Fault::Cut(5), "layercake-agent"),
        (AGENT, Fault::Status(503), "status 503"),
    ] {
        let world = World::new(Layer0How::Agent, AGENT_SCRIPT);
        let digest = world.wanted.digest;
        world.fake.change(&path(&digest, file), |answer| answer.faults.push_back(fault));
        world.fails(false, part);
        assert!(matches!(world.stage(), Ok(Way::Agent(_))), "{fault:?}");
    }
}

#[test]
fn the_next_server_is_asked_where_one_fails() {
    let mut world = World::new(Layer0How::Agent, AGENT_SCRIPT);
    let bad = world.fake.mirror();
    bad.change(&path(&world.wanted.digest, AGENT), |answer| {
        answer.faults.push_back(Fault::Corrupt(2));
    });
    world.stager.servers.insert(0, bad.url());
    assert!(matches!(world.stage(), Ok(Way::Agent(_))));
    world.stager.servers.clear();
    world.fails(false, "no boot server is known");
}

#[test]
fn the_manifest_decides_which_agent_it_is() {
    let mut world = World::new(Layer0How::Agent, AGENT_SCRIPT);
    world.wanted.agent = Some(Digest::of(b"another"));
    world.fails(true, "another agent than");
}

#[test]
fn what_the_kernel_does_not_load_is_a_reboot_or_an_error_with_its_reason() {
    let mut world = World::new(Layer0How::Auto, AGENT_SCRIPT);
    let archive = b"archive".to_vec();
    world.wanted.archives = vec![Layer0Archive {
        digest: Digest::of(&archive),
        size: 7,
        url: "/boot/overlay/site.cpio".to_owned(),
    }];
    world.fake.add("/boot/overlay/site.cpio", Answer::ok(archive));
    let Ok(Way::Reboot(Some(why))) = world.stage() else { panic!("{:?}", world.stage()) };
    assert!(why.starts_with("kexec_file_load: "), "{why}");
    assert_eq!(world.fake.requests("/boot/overlay/site.cpio").len(), 1);
    world.wanted.how = Layer0How::Kexec;
    world.fails(true, "kexec_file_load: ");
    world.wanted.archives[0].digest = Digest::of(b"other");
    world.fails(false, "came in place of");
}

#[test]
fn what_does_not_fit_into_memory_is_refused_with_the_figures() {
    let failure = check_memory(u64::MAX / 2).expect_err("too much");
    assert!(failure.why.contains("MiB are available") && failure.last, "{failure:?}");
    check_memory(1).expect("little");
}

#[test]
fn the_kernels_refusals_are_told_apart() {
    for (errno, part) in [(1, "kexec_load_disabled"), (38, "built without"), (129, "another key")] {
        let text = refusal(&io::Error::from_raw_os_error(errno));
        assert!(text.contains(part), "{text}");
    }
    assert!(refusal(&io::Error::from_raw_os_error(12)).contains("memory"));
}

#[test]
fn a_node_with_keys_takes_only_what_one_of_them_signed() {
    let random = SystemRandom::new();
    let algorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;
    let der = EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("key");
    let pair = EcdsaKeyPair::from_pkcs8(algorithm, der.as_ref(), &random).expect("key");
    let key = PublicKey::from_point("site.pem", pair.public_key().as_ref()).expect("point");
    let mut world = World::new(Layer0How::Agent, AGENT_SCRIPT);
    world.stager.policy = Policy::Signed(vec![key]);
    let signature = path(&world.wanted.digest, SIGNATURE);
    world.fails(false, "this node wants sha256:");
    let sign = |bytes: &[u8]| {
        let signed = pair.sign(&random, bytes).expect("sign");
        Answer::ok(signature_text(signed.as_ref()).into_bytes())
    };
    world.fake.add(&signature, sign(b"something else"));
    world.fails(false, "no key of this node has signed");
    let url = format!("{}{}", world.fake.url(), path(&world.wanted.digest, MANIFEST));
    let manifest = world.stager.transport.get(&url, &[]).expect("get").into_bytes(9999);
    world.fake.add(&signature, sign(&manifest.expect("manifest")));
    assert!(matches!(world.stage(), Ok(Way::Agent(_))));
    // An archive could replace the keys.
    let archive = Layer0Archive { digest: Digest::of(b"x"), size: 1, url: "/x".to_owned() };
    let statement = archive_statement(&archive.digest);
    world.wanted.archives = vec![archive];
    world.wanted.how = Layer0How::Kexec;
    world.fails(true, "no key of this node has signed the archive x (sha256:");
    world.wanted.how = Layer0How::Auto;
    assert!(matches!(world.stage(), Ok(Way::Reboot(Some(_)))));
    world.wanted.how = Layer0How::Kexec;
    world.fake.add("/x.sig", sign(b"layercake overlay of another digest\n"));
    world.fails(true, "no key of this node has signed the archive x (sha256:");
    world.fake.change("/x.sig", |answer| answer.faults.push_back(Fault::Status(503)));
    world.fails(false, "status 503");
    world.fake.add("/x", Answer::ok(b"x".to_vec()));
    world.fake.add("/x.sig", sign(statement.as_bytes()));
    // What is no kernel the kernel refuses, when all signatures are good.
    world.fails(true, "kexec_file_load: ");
    world.stager.policy = Policy::Unusable("site.pem is no key".to_owned());
    world.fails(false, "site.pem is no key");
}
