"""Facts about samples beside their shards, joined by key."""
