"""One short file for each thing a person runs."""
