//! The storage in one SQLite file: write-ahead log, synchronous=FULL, so a write that returned survives a power cut.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use protocol::ids::NodeId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{Row, Sqlite, Transaction};

use super::{Loaded, MAX_ROLLS, NewRoll, NodeRow, Storage, StorageError};
use crate::rolls::RollRecord;

/// How long a statement waits for another process that holds the file, such as a backup.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// SQLite's result code SQLITE_FULL (<https://sqlite.org/rescode.html#full>).
const SQLITE_FULL: &str = "13";

/// The storage in one SQLite file.
#[derive(Debug, Clone)]
pub struct SqliteStorage {
    pool: SqlitePool,
    path: PathBuf,
}

impl SqliteStorage {
    /// Opens the file, makes it if it is not there, and brings it to this version's form.
    ///
    /// # Errors
    /// If the file cannot be opened, is of a later version, or is damaged.
    pub async fn open(path: &Path) -> Result<Self, StorageError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT);
        let open = |source: Box<dyn std::error::Error + Send + Sync>| StorageError::Open {
            path: path.to_owned(),
            source,
        };
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await
            .map_err(|error| open(error.into()))?;
        let storage = Self { pool, path: path.to_owned() };
        let check: String = sqlx::query_scalar("PRAGMA quick_check(1)")
            .fetch_one(&storage.pool)
            .await
            .map_err(|error| open(error.into()))?;
        if check != "ok" {
            return Err(storage.damaged(check));
        }
        sqlx::migrate!("./migrations")
            .run(&storage.pool)
            .await
            .map_err(|error| open(error.into()))?;
        Ok(storage)
    }

    fn damaged(&self, reason: String) -> StorageError {
        StorageError::Damaged { path: self.path.clone(), reason }
    }

    async fn read_all(&self) -> Result<Loaded, StorageError> {
        let rows = sqlx::query("SELECT * FROM nodes ORDER BY id")
            .fetch_all(&self.pool)
            .await
            .map_err(reading)?;
        let nodes = rows.iter().map(|row| self.node(row)).collect::<Result<_, _>>()?;
        let rows = sqlx::query("SELECT * FROM rolls ORDER BY id DESC LIMIT $1")
            .bind(MAX_ROLLS)
            .fetch_all(&self.pool)
            .await
            .map_err(reading)?;
        let rolls = rows.iter().rev().map(|row| self.roll(row)).collect::<Result<_, _>>()?;
        Ok(Loaded { nodes, rolls })
    }

    fn node(&self, row: &SqliteRow) -> Result<NodeRow, StorageError> {
        let id: String = row.try_get("id").map_err(reading)?;
        let cell = Cell { storage: self, row, place: format!("node {id}") };
        Ok(NodeRow {
            macs: cell.json("macs")?,
            uuid: row.try_get("uuid").map_err(reading)?,
            address: cell.parsed("address")?,
            first_seen_ms: cell.number("first_seen_ms")?,
            last_seen_ms: cell.number("last_seen_ms")?,
            timeline: cell.json("timeline")?,
            observed: cell.optional_json("observed")?,
            desired: cell.json("desired")?,
            hardware: cell.optional_json("hardware")?,
            id: cell.required("id", &id)?,
        })
    }

    fn roll(&self, row: &SqliteRow) -> Result<RollRecord, StorageError> {
        let id: i64 = row.try_get("id").map_err(reading)?;
        let cell = Cell { storage: self, row, place: format!("roll {id}") };
        let text = |column| row.try_get::<String, _>(column).map_err(reading);
        Ok(RollRecord {
            id: cell.number("id")?,
            name: cell.required("name", &text("name")?)?,
            version: cell.required("version", &text("version")?)?,
            reference: cell.required("reference", &text("reference")?)?,
            members: cell.json("members")?,
        })
    }

    async fn write<'a, T>(
        &'a self,
        work: impl for<'t> FnOnce(
            &'t mut Transaction<'static, Sqlite>,
        ) -> BoxFuture<'t, Result<T, sqlx::Error>>,
    ) -> Result<T, StorageError> {
        let mut transaction = self.pool.begin().await.map_err(writing)?;
        let result = work(&mut transaction).await.map_err(writing)?;
        transaction.commit().await.map_err(writing)?;
        Ok(result)
    }
}

/// One row while it is read: errors name table, id and column.
struct Cell<'a> {
    storage: &'a SqliteStorage,
    row: &'a SqliteRow,
    place: String,
}

impl Cell<'_> {
    fn damaged(&self, column: &str, reason: impl std::fmt::Display) -> StorageError {
        self.storage.damaged(format!("{}, {column}: {reason}", self.place))
    }

    fn optional_json<T: DeserializeOwned>(&self, column: &str) -> Result<Option<T>, StorageError> {
        let text: Option<String> = self.row.try_get(column).map_err(reading)?;
        let parse = |text: String| serde_json::from_str(&text);
        text.map(parse).transpose().map_err(|error| self.damaged(column, error))
    }

    fn json<T: DeserializeOwned>(&self, column: &str) -> Result<T, StorageError> {
        self.optional_json(column)?.ok_or_else(|| self.damaged(column, "it is empty"))
    }

    fn number(&self, column: &str) -> Result<u64, StorageError> {
        let number: i64 = self.row.try_get(column).map_err(reading)?;
        u64::try_from(number).map_err(|error| self.damaged(column, error))
    }

    fn required<T: std::str::FromStr>(&self, column: &str, text: &str) -> Result<T, StorageError>
    where
        T::Err: std::fmt::Display,
    {
        text.parse().map_err(|error| self.damaged(column, error))
    }

    fn parsed<T: std::str::FromStr>(&self, column: &str) -> Result<Option<T>, StorageError>
    where
        T::Err: std::fmt::Display,
    {
        let text: Option<String> = self.row.try_get(column).map_err(reading)?;
        text.map(|text| self.required(column, &text)).transpose()
    }
}

impl Storage for SqliteStorage {
    fn load(&self) -> BoxFuture<'_, Result<Loaded, StorageError>> {
        self.read_all().boxed()
    }

    fn save_seen<'a>(
        &'a self,
        nodes: &'a [NodeRow],
        rolls: &'a [RollRecord],
    ) -> BoxFuture<'a, Result<(), StorageError>> {
        async move {
            let (nodes, rolls) = (nodes.to_vec(), rolls.to_vec());
            self.write(|transaction| {
                async move {
                    for node in &nodes {
                        upsert_seen(transaction, node).await?;
                    }
                    update_rolls(transaction, &rolls).await
                }
                .boxed()
            })
            .await
        }
        .boxed()
    }

    fn save_desired<'a>(&'a self, nodes: &'a [NodeRow]) -> BoxFuture<'a, Result<(), StorageError>> {
        async move {
            let nodes = nodes.to_vec();
            self.write(|transaction| {
                async move { upsert_desired(transaction, &nodes).await }.boxed()
            })
            .await
        }
        .boxed()
    }

    fn create_roll<'a>(
        &'a self,
        roll: &'a NewRoll,
        nodes: &'a [NodeRow],
        superseded: &'a [RollRecord],
    ) -> BoxFuture<'a, Result<u64, StorageError>> {
        async move {
            let (roll, nodes, superseded) = (roll.clone(), nodes.to_vec(), superseded.to_vec());
            self.write(|transaction| {
                async move {
                    upsert_desired(transaction, &nodes).await?;
                    update_rolls(transaction, &superseded).await?;
                    insert_roll(transaction, &roll).await
                }
                .boxed()
            })
            .await
        }
        .boxed()
    }

    fn remove_node<'a>(&'a self, id: &'a NodeId) -> BoxFuture<'a, Result<(), StorageError>> {
        async move {
            let query = sqlx::query("DELETE FROM nodes WHERE id = $1").bind(id.as_str());
            query.execute(&self.pool).await.map_err(writing)?;
            Ok(())
        }
        .boxed()
    }
}

async fn upsert_seen(
    transaction: &mut Transaction<'static, Sqlite>,
    node: &NodeRow,
) -> Result<(), sqlx::Error> {
    const SQL: &str = "INSERT INTO nodes \
        (id, macs, uuid, address, first_seen_ms, last_seen_ms, timeline, observed, desired, hardware) \
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) \
        ON CONFLICT (id) DO UPDATE SET macs = excluded.macs, uuid = excluded.uuid, \
        address = excluded.address, last_seen_ms = excluded.last_seen_ms, \
        timeline = excluded.timeline, observed = excluded.observed, \
        hardware = COALESCE(excluded.hardware, hardware)";
    insert_node(transaction, SQL, node).await
}

async fn upsert_desired(
    transaction: &mut Transaction<'static, Sqlite>,
    nodes: &[NodeRow],
) -> Result<(), sqlx::Error> {
    const SQL: &str = "INSERT INTO nodes \
        (id, macs, uuid, address, first_seen_ms, last_seen_ms, timeline, observed, desired, hardware) \
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) \
        ON CONFLICT (id) DO UPDATE SET desired = excluded.desired";
    for node in nodes {
        insert_node(transaction, SQL, node).await?;
    }
    Ok(())
}

async fn insert_node(
    transaction: &mut Transaction<'static, Sqlite>,
    sql: &'static str,
    node: &NodeRow,
) -> Result<(), sqlx::Error> {
    sqlx::query(sql)
        .bind(node.id.as_str())
        .bind(json(&node.macs)?)
        .bind(node.uuid.as_deref())
        .bind(node.address.map(|address| address.to_string()))
        .bind(integer(node.first_seen_ms))
        .bind(integer(node.last_seen_ms))
        .bind(json(&node.timeline)?)
        .bind(node.observed.as_ref().map(json).transpose()?)
        .bind(json(&node.desired)?)
        .bind(node.hardware.as_ref().map(json).transpose()?)
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

async fn insert_roll(
    transaction: &mut Transaction<'static, Sqlite>,
    roll: &NewRoll,
) -> Result<u64, sqlx::Error> {
    let sql = "INSERT INTO rolls (name, version, reference, members) VALUES ($1, $2, $3, $4) \
        RETURNING id";
    let id: i64 = sqlx::query_scalar(sql)
        .bind(roll.name.as_str())
        .bind(roll.version.as_str())
        .bind(roll.reference.to_string())
        .bind(json(&roll.members)?)
        .fetch_one(&mut **transaction)
        .await?;
    u64::try_from(id).map_err(|error| sqlx::Error::Decode(error.into()))
}

async fn update_rolls(
    transaction: &mut Transaction<'static, Sqlite>,
    rolls: &[RollRecord],
) -> Result<(), sqlx::Error> {
    for roll in rolls {
        sqlx::query("UPDATE rolls SET members = $1 WHERE id = $2")
            .bind(json(&roll.members)?)
            .bind(integer(roll.id))
            .execute(&mut **transaction)
            .await?;
    }
    Ok(())
}

fn json<T: Serialize>(value: &T) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|error| sqlx::Error::Encode(error.into()))
}

/// SQLite's integers are signed; ours are milliseconds and small numbers.
fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn reading(error: sqlx::Error) -> StorageError {
    StorageError::Query { action: "read", source: error.into() }
}

fn writing(error: sqlx::Error) -> StorageError {
    match error.as_database_error().and_then(|database| database.code()) {
        Some(code) if code == SQLITE_FULL => StorageError::Full,
        _ => StorageError::Query { action: "written", source: error.into() },
    }
}

#[cfg(test)]
mod tests {
    use protocol::api::RollState;
    use protocol::ids::{Digest, Mac};

    use super::*;
    use crate::rolls::Member;

    fn node(id: &str) -> NodeRow {
        let id: NodeId = id.parse().expect("id");
        let observed = include_str!("../../../protocol/golden/v1/observed.json");
        NodeRow {
            macs: vec![Mac([2, 0, 0, 0, 0, 1])],
            uuid: Some("u".to_owned()),
            address: Some([10, 9, 0, 5].into()),
            first_seen_ms: 1,
            last_seen_ms: 2,
            timeline: crate::timeline::Timeline::default(),
            observed: Some(serde_json::from_str(observed).expect("golden")),
            desired: crate::desired::first(id.clone()),
            hardware: None,
            id,
        }
    }

    fn roll(node: &str) -> NewRoll {
        let digest = Digest::of(b"x");
        NewRoll {
            name: "hello".parse().expect("name"),
            version: "1".parse().expect("version"),
            reference: format!("http://r:1/hello:1@{digest}").parse().expect("reference"),
            members: vec![Member {
                node: node.parse().expect("id"),
                desired_version: 2,
                state: RollState::Pending,
                reason: None,
                report: None,
            }],
        }
    }

    #[tokio::test]
    async fn what_was_written_is_read_back_after_a_restart() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("inventory.db");
        let storage = SqliteStorage::open(&path).await.expect("open");
        let mut wanted = node("n1");
        storage.save_seen(&[node("n1"), node("n2")], &[]).await.expect("seen");
        wanted.desired.version = 2;
        let id = storage.create_roll(&roll("n1"), &[wanted.clone()], &[]).await.expect("roll");
        drop(storage);

        let storage = SqliteStorage::open(&path).await.expect("again");
        let loaded = storage.load().await.expect("load");
        assert_eq!(loaded.nodes, [wanted, node("n2")]);
        assert_eq!((loaded.rolls.len(), loaded.rolls[0].id), (1, id));
        assert_eq!(loaded.rolls[0].members, roll("n1").members);
    }

    #[tokio::test]
    async fn a_batch_of_what_was_seen_never_overwrites_what_is_wanted() {
        let dir = tempfile::tempdir().expect("dir");
        let storage = SqliteStorage::open(&dir.path().join("i.db")).await.expect("open");
        let mut wanted = node("n1");
        wanted.desired.version = 9;
        storage.save_desired(&[wanted]).await.expect("desired");
        let mut seen = node("n1");
        seen.last_seen_ms = 77;
        let hardware = protocol::facts::Hardware { memory: 7, ..Default::default() };
        seen.hardware = Some(hardware.clone());
        storage.save_seen(&[seen.clone()], &[]).await.expect("seen");
        // The next batch says nothing of it, which is not that there is none.
        seen.hardware = None;
        storage.save_seen(&[seen], &[]).await.expect("seen again");
        let loaded = storage.load().await.expect("load");
        assert_eq!((loaded.nodes[0].desired.version, loaded.nodes[0].last_seen_ms), (9, 77));
        assert_eq!(loaded.nodes[0].hardware, Some(hardware));
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("i.db");
        std::fs::write(&path, vec![b'x'; 8192]).expect("write");
        let error = SqliteStorage::open(&path).await.expect_err("garbage").to_string();
        assert_eq!(error, format!("the inventory {} could not be opened", path.display()));
    }

    #[tokio::test]
    async fn a_damaged_row_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let storage = SqliteStorage::open(&dir.path().join("i.db")).await.expect("open");
        storage.save_seen(&[node("n1")], &[]).await.expect("seen");
        let sql = "UPDATE nodes SET macs = '[\"zz\"]'";
        sqlx::query(sql).execute(&storage.pool).await.expect("damage");
        let error = storage.load().await.expect_err("damaged").to_string();
        assert!(error.contains("node n1, macs: `zz` is not a valid MAC address"), "{error}");
    }

    #[tokio::test]
    async fn a_removed_node_is_gone_and_rolls_keep_how_they_stand() {
        let dir = tempfile::tempdir().expect("dir");
        let storage = SqliteStorage::open(&dir.path().join("i.db")).await.expect("open");
        storage.create_roll(&roll("n1"), &[node("n1")], &[]).await.expect("roll");
        let mut rolls = storage.load().await.expect("load").rolls;
        rolls[0].members[0].state = RollState::Done;
        storage.save_seen(&[], &rolls).await.expect("rolls");
        storage.remove_node(&"n1".parse().expect("id")).await.expect("remove");
        let loaded = storage.load().await.expect("load");
        assert_eq!((loaded.nodes.len(), loaded.rolls), (0, rolls));
    }
}
