"""The volumes on disk: `layout` says what a store holds, `ingest` makes one, `reader` opens it (docs/format.md)."""
