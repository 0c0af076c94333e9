"""From shards to batches: sample order, crops, augmentation, the DALI and the in-memory loader.

Public names:
    `open_loader.open_loader`: iterate the batches of a split.
    `loader.Batch`: images and labels on the device.
    `training_order.TrainingOrder`: which samples each step takes, for any number of processes.
    `training_order.training_specs`, `training_order.evaluation_specs`: the batches of a rank.
    `in_memory.preload`: decode splits once and hold them on the device.
    `quarantine.Quarantine`: the damaged samples that a run skips.
    `config.DataConfig`: the `data` section of a configuration.
    `pixels.normalize`, `pixels.to_pixels`: between pixels and normalized images.
"""
