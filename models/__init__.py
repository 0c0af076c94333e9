"""The networks; no training state, no input or output beyond loading weights."""
