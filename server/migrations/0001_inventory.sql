-- Nodes: what is wanted of them (desired) is durable before it is acknowledged; what has been seen is written in batches.
CREATE TABLE nodes (
    id            TEXT    PRIMARY KEY,
    macs          TEXT    NOT NULL, -- JSON array, the boot interface first
    uuid          TEXT,
    address       TEXT,
    first_seen_ms INTEGER NOT NULL,
    last_seen_ms  INTEGER NOT NULL,
    timeline      TEXT    NOT NULL, -- JSON: boot ids and phases of the latest boot
    observed      TEXT,             -- JSON: the last report
    desired       TEXT    NOT NULL  -- JSON, with its version
);

CREATE TABLE rolls (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    name      TEXT NOT NULL,
    version   TEXT NOT NULL,
    reference TEXT NOT NULL,
    members   TEXT NOT NULL -- JSON array, how each node stands
);
