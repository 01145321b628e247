//! The part of a set's worker that knows where what outlives an instance lies, and hands identities on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use protocol::imageset::Profile;

use super::{Member, Worker};
use crate::containers::{Keeping, Spec, keep};

impl Worker {
    /// Where persistent directories may lie: on the disk labelled LAYERCAKE when one is mounted.
    pub(super) fn keeping(&self) -> Keeping {
        let dirs = &self.around.dirs;
        let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev()).ok();
        let disk = dirs.disk();
        let mounted = device(&disk).is_some_and(|disk| device(dirs.root()) != Some(disk));
        Keeping { memory: dirs.persistent(), disk: mounted.then(|| disk.join("persistent")) }
    }

    fn identity_dir(&self, container: &protocol::ids::Name) -> PathBuf {
        let keeping = self.keeping();
        keep::identity_dir(&keeping.disk.unwrap_or(keeping.memory), &self.name, container)
    }

    /// A whole system is known by its SSH host keys and its machine-id: the next version has those of the one that serves.
    /// A container that is started again in the root it had has them already.
    pub(super) fn hand_identity_on(&self, spec: &Spec) {
        if spec.profile != Profile::System || spec.restarts > 0 {
            return;
        }
        let serving = self.running.iter().flat_map(|running| &running.members);
        for member in serving.filter(|it| it.container.name == spec.name) {
            self.keep_identity(member);
        }
        keep::restore_identity(&self.identity_dir(&spec.name), &spec.root);
    }

    /// Keeps the identity of a whole system whose root is there.
    pub(super) fn keep_identity(&self, member: &Member) {
        if member.container.profile == Profile::System {
            let dir = self.identity_dir(&member.container.name);
            keep::remember_identity(&dir, &member.mount.join("root"));
        }
    }
}
