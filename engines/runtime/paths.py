"""Where the repository (or the installed packages) and their configurations lie on disk."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `launch/` and `engines/`: a checkout, or site-packages."""

# A wheel has the folder inside a package; a checkout has it under both names.
CONFIGS = ROOT / "configs" if (ROOT / "configs").is_dir() else ROOT / "telltale" / "configs"
"""The folder of the configurations that come with telltale."""


def find_config(path: str | Path) -> Path:
    """The file that a user names: from the current folder, else among those that come with telltale.

    Args:
        path: any path; relative ones such as `configs/quickstart.yaml` are found from anywhere.

    Returns:
        an existing file where there is one, else `path` itself, for the caller's message.
    """
    named = Path(path)
    supplied = CONFIGS.parent / named
    return supplied if not named.exists() and supplied.exists() else named
