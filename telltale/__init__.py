"""Score images with a detector, explain its answers, and evaluate it, from Python."""
