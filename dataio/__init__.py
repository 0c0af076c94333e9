"""From files to batches: layouts, shards, sample order and the DALI loader."""
