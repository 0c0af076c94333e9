"""Training a detector: the loop, the exact training step, and everything that decides a run's result.

Read `trainer.Trainer.train_step` first, then `loop.run_training`.

* `loop.run_training` is a run from start to end; `trainer.Trainer` does one step at a time.
* `build` makes the model, `optim` the optimizer, `schedule` the run in steps, `run_data` its batches.
* `mixup`, `batchnorm`, `ema`, `nonfinite` are the parts of a step; `meters` counts its errors.
* `validate.validate` and `selection.ModelSelection` decide which weights are kept as best.
* `resume` is what checkpoints hold and what a continuation must have in common with its run.
* `initial_weights.weights_files` looks for `model.weights` where compute nodes do.
* `dry_run.plan_training` says what a run would do; `batch_plan` and `detector_memory` are its arithmetic.
* `console` and `figures` are what a user sees.
"""
