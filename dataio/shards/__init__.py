"""The shard format and its reader: WebDataset tars, a sample index and a manifest.

Public names:
    `shard_set.ShardSet`: one split of a shard folder, read by sample id.
    `manifest.read_manifest`, `manifest.LabelSpaces`, `manifest.SAMPLE`: the format.
    `local_cache.CacheOptions`: copies of shards in a local folder.
    `remote_cache`, `remote_folder`: folders of shards behind a URL, read from such copies.
    `tar_reader.DamagedSample`: the error of a sample that cannot be read.
    `groups.read_groups`: which images belong together.
"""
