"""The loops and what they need: training, evaluation, checkpoints, logs."""
