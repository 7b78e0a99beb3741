"""The feature store: table, shards, lease."""
