-- What a node's hardware is: comes with one report of a boot, and is written when it comes.
ALTER TABLE nodes ADD COLUMN hardware TEXT; -- JSON
