"""Files and storage: atomic writes, retries, digests."""
