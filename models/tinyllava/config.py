"""Names that a parser needs; imports neither PyTorch nor transformers."""

TINY = "random:tiny"
"""In place of a folder: a small model of random weights, for quickstart and tests."""
