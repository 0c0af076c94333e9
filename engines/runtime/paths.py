"""Where the repository (or the installed packages) lie on disk."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `launch/`, `engines/` and, in a checkout, `configs/`."""
