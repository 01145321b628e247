//! What firmware and iPXE fetch: the rendered script, the kernel, the initramfs, the archives beside it.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::ids::{Digest, Mac, NodeId};
use protocol::layer0::SIGNATURE_SUFFIX;
use serde::Deserialize;

use super::{ApiError, App, Shared, file, query};
use crate::boot::Script;
use crate::clock::now_ms;
use crate::inventory::Layer0Choice;
use crate::layer0::to_boot;

#[derive(Debug, Deserialize)]
pub(super) struct Machine {
    mac: Mac,
    #[serde(default)]
    uuid: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct MaybeMachine {
    #[serde(default)]
    mac: Option<Mac>,
}

impl MaybeMachine {
    pub(super) fn mac(&self) -> Option<Mac> {
        self.mac
    }
}

pub(super) async fn ipxe(
    State(app): Shared,
    machine: Result<Query<Machine>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Machine { mac, uuid } = query(machine)?;
    let node = app.inventory.script_fetched(mac, uuid.as_deref(), now_ms())?;
    tracing::info!(%node, %mac, "iPXE fetches its script");
    let overlays: Vec<&str> = app.overlays.of_node(&node).map(|it| it.name.as_str()).collect();
    let layer0 = layer0_to_boot(&app, &node).await?;
    let (url, extra) = (&app.url, &app.cmdline);
    let script = Script { node: &node, mac, url, layer0, extra, overlays: &overlays };
    let text = script.render().map_err(|error| ApiError::internal(super::error::chain(&error)))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
}

/// The Layer0 that a node boots now.
async fn layer0_to_boot(app: &Arc<App>, node: &NodeId) -> Result<Option<Digest>, ApiError> {
    let default = super::layer0::default_build(app).await?;
    let Layer0Choice { wanted, last_good, attempts } = app.inventory.layer0_choice(node);
    let has = |digest: &Digest| app.layer0.has(digest);
    let first = to_boot(wanted, default, None, 0, has);
    let chosen = to_boot(wanted, default, last_good, attempts, has);
    if chosen != first {
        let (good, bad) = (shown(chosen), shown(first));
        tracing::warn!(%node, "{attempts} boots from {bad} brought no report: {good}, which did, is booted");
    }
    if let Some(wanted) = wanted.filter(|wanted| !has(wanted)) {
        tracing::warn!(%node, "Layer0 {wanted} is wanted but not here; {} is booted", shown(chosen));
    }
    Ok(chosen)
}

fn shown(digest: Option<Digest>) -> String {
    digest.map_or("server.layer0_dir".to_owned(), |digest| digest.short())
}

pub(super) async fn vmlinuz(State(app): Shared, headers: HeaderMap) -> Result<Response, ApiError> {
    file::answer(&app.layer0_dir.join("vmlinuz"), &headers, || ()).await
}

pub(super) async fn initramfs(
    State(app): Shared,
    machine: Result<Query<MaybeMachine>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let machine = query(machine)?;
    let path = app.layer0_dir.join("initramfs.img");
    let sent = move || {
        if let Some(mac) = machine.mac {
            tracing::info!(%mac, "kernel and initramfs are sent");
            app.inventory.initramfs_sent(mac, now_ms());
        }
    };
    file::answer(&path, &headers, sent).await
}

pub(super) async fn overlay(
    State(app): Shared,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    if let Some(path) = app.overlays.find(&name) {
        return file::answer(path, &headers, || ()).await;
    }
    // A signature lies beside its archive.
    let signed = name.strip_suffix(SIGNATURE_SUFFIX).and_then(|name| app.overlays.find(name));
    let path = signed.ok_or_else(|| {
        let text = "there is no overlay of this name: the config names them all (boot.overlays)";
        ApiError::new(StatusCode::NOT_FOUND, "no_overlay", text)
    })?;
    let mut path = path.as_os_str().to_owned();
    path.push(SIGNATURE_SUFFIX);
    file::answer(std::path::Path::new(&path), &headers, || ()).await
}

pub(super) async fn loader(State(app): Shared, headers: HeaderMap) -> Result<Response, ApiError> {
    let dir = app.loader_dir.as_ref().ok_or_else(|| {
        let text = "ipxe.efi is not served: tftp.root in the config names no directory";
        ApiError::new(StatusCode::NOT_FOUND, "no_loader", text)
    })?;
    file::answer(&dir.join("ipxe.efi"), &headers, || ()).await
}
