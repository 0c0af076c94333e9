"""What every run and command needs from the machine: processes, exit codes, logs, faults and versions.

Knows neither models nor configurations.

* `command.run_command` runs a command and leaves with its exit code.
* `ending.end_in` ends a process that will not end by itself.
* `distributed.init_distributed`, `World`, `on_all_ranks`, `on_rank0`, `StopRequest`: the processes of a run.
* `machine.Machine` is the nodes and GPUs that a run is planned for.
* `run_folder.run_in_folder` locks a run's folder and writes its exit.json.
* `watchdog.HangWatchdog` names a rank that hangs, `hang_report.write_hang_report` says what each did;
  `rendezvous` survives restarts of the launcher's workers.
* `run_log.RunLog` writes metrics.jsonl, Weights & Biases (`wandb_run.WandbRun`, `wandb_metrics`) and TensorBoard
  (`tensorboard_log`); `wandb_rebuild.rebuild_run` makes W&B's copy again,
  `wandb_results.send_results` sends what a measurement found, `wandb_mode` says whether.
* `profiler.StepProfile` traces steps.
* `fault_injection.inject` lets tests kill or hang a run at a named point.
* `inference.HostCopy`, `fetch_late`, `inference_batch`: forward passes that keep a GPU busy.
* `precision`, `versions`, `peak_memory`, `paths`: small facts about the machine and the installation.
"""
