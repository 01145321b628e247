//! What firmware and iPXE fetch: the rendered script, the kernel, the initramfs, the archives beside it.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::ids::Mac;
use serde::Deserialize;

use super::{ApiError, Shared, file, query};
use crate::boot::Script;
use crate::clock::now_ms;

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

pub(super) async fn ipxe(
    State(app): Shared,
    machine: Result<Query<Machine>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Machine { mac, uuid } = query(machine)?;
    let node = app.inventory.script_fetched(mac, uuid.as_deref(), now_ms())?;
    tracing::info!(%node, %mac, "iPXE fetches its script");
    let overlays: Vec<&str> = app.overlays.of_node(&node).map(|it| it.name.as_str()).collect();
    let script =
        Script { node: &node, mac, url: &app.url, extra: &app.cmdline, overlays: &overlays };
    let text = script.render().map_err(|error| ApiError::internal(super::error::chain(&error)))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
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
    let path = app.overlays.find(&name).ok_or_else(|| {
        let text = "there is no overlay of this name: the config names them all (boot.overlays)";
        ApiError::new(StatusCode::NOT_FOUND, "no_overlay", text)
    })?;
    file::answer(path, &headers, || ()).await
}

pub(super) async fn loader(State(app): Shared, headers: HeaderMap) -> Result<Response, ApiError> {
    let dir = app.loader_dir.as_ref().ok_or_else(|| {
        let text = "ipxe.efi is not served: tftp.root in the config names no directory";
        ApiError::new(StatusCode::NOT_FOUND, "no_loader", text)
    })?;
    file::answer(&dir.join("ipxe.efi"), &headers, || ()).await
}
