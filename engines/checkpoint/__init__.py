"""Files that hold a detector: checkpoints of a run, best.pt, final.safetensors and exports.

* `files.CheckpointFolder` keeps the newest complete checkpoints; `files.load` reads any checkpoint file.
* `async_saver.Saver` writes them while training goes on.
* `load_model.load_model` builds the network that any of these files holds.
* `export_format` is the folder form for other programs.
"""
