"""Experiments of many runs: grids of trainings, and evaluation protocols with their cells.

Each run or cell has a folder of its own and is finished by a file, so that a killed experiment
resumes, and the tasks of a job array share one.

* `grid.read_grid`: all combinations of a sweep file
* `grid.run_grid`: train and evaluate them one after the other, with one table
* `protocol.run_protocol`: robustness, aligned, cross_generator and leave_one_out
* `protocol_cells.Protocol`: what a protocol is: cells, and the computation of one
* `protocol_wandb.send_protocol`: a protocol's result for Weights & Biases
* `protocol_result`: the content of protocol.json and its Markdown tables
"""
