"""Where raw rows come from: `locate` finds files, `survey` hashes and cuts them, `read_rows` reads a shard."""
