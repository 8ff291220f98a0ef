"""Sources of raw rows: `locate` finds files, `survey` hashes and splits them into shards, `read_rows` reads a shard."""
