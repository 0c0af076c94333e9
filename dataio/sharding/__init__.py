"""Writing shards: plan, workers, merging, duplicates, verification.

Public names:
    `job.ShardJob`, `job.run_job`: write a shard folder, or finish one that was interrupted.
    `job.run_array_task`, `job.finish_job`: the same, shared by the tasks of a job array.
    `job.write_shards`: both in one call.
    `one_class.require_both_classes`: a set has photographs and fakes.
    `verify.verify_shards`: check every hash, index, key and image of a folder.
    `quickstart.make_synthetic_shards`: shards of drawn images.
"""
