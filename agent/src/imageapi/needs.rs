//! What a request needs of registries and servers, found before anything is made. Pure.

use super::error::ApiError;
use super::types::{Attach, Mount, MountKind};

/// Most objects that one request makes.
const MAX_OBJECTS: usize = 64;

/// What a request needs of registries and servers.
#[derive(Debug, Default)]
pub(super) struct Needs {
    /// References of images.
    pub(super) images: Vec<String>,
    /// URLs and digests of files.
    pub(super) files: Vec<(String, String)>,
    objects: usize,
}

impl Needs {
    /// Of an attachment and all that is described in it.
    pub(super) fn of_attach(spec: &Attach) -> Result<Self, ApiError> {
        let mut needs = Self::default();
        needs.attach(spec)?;
        Ok(needs)
    }

    /// Of a mount and all that is described in it.
    pub(super) fn of_mount(spec: &Mount) -> Result<Self, ApiError> {
        let mut needs = Self::default();
        needs.mount(spec)?;
        Ok(needs)
    }

    fn count(&mut self) -> Result<(), ApiError> {
        self.objects += 1;
        match self.objects > MAX_OBJECTS {
            true => Err(ApiError::invalid(format!("more than {MAX_OBJECTS} objects at once"))),
            false => Ok(()),
        }
    }

    fn attach(&mut self, spec: &Attach) -> Result<(), ApiError> {
        self.count()?;
        let mount = spec.loopback.as_ref().and_then(|loopback| loopback.mount.as_ref());
        mount.map_or(Ok(()), |mount| self.mount(mount))
    }

    fn mount(&mut self, spec: &Mount) -> Result<(), ApiError> {
        self.count()?;
        if spec.id != 0 {
            return Ok(());
        }
        match spec.kind {
            Some(MountKind::Oci) => {
                self.images.extend(spec.oci.as_ref().map(|oci| oci.image.clone()));
            }
            Some(MountKind::Uri) => {
                let file = spec.uri.as_ref().map(|uri| (uri.uri.clone(), uri.digest.clone()));
                self.files.extend(file);
            }
            Some(MountKind::Attach) => {
                if let Some(attach) = spec.attach.as_ref().and_then(|it| it.attach.as_ref()) {
                    self.attach(attach)?;
                }
            }
            Some(MountKind::Bind) => {
                if let Some(mount) = spec.bind.as_ref().and_then(|it| it.mount.as_ref()) {
                    self.mount(mount)?;
                }
            }
            Some(MountKind::Overlay) => {
                let lower = spec.overlay.as_ref().and_then(|it| it.lower.as_ref());
                for mount in lower.into_iter().flatten() {
                    self.mount(mount)?;
                }
            }
            Some(MountKind::Nfs) | None => {}
        }
        Ok(())
    }
}
