"""Whether Weights & Biases is used, and how."""

import contextlib
import os

WANDB_MODES = ("auto", "online", "offline", "off")
WANDB_HELP = "send the results to Weights & Biases; auto does so where WANDB_MODE or a key is configured"


def choose_mode(setting: str, *, without_account: str = "offline") -> str:
    """The mode that `setting` stands for: online, offline, disabled, or off.

    Args:
        setting: auto is WANDB_MODE's, else online where a key is configured, else `without_account`.
    """
    if setting != "auto":
        return setting
    # An argument beats the environment in W&B, so the environment is asked here.
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_key() else without_account


def _has_netrc_key() -> bool:
    import netrc

    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


def sends_results(mode: str) -> bool:
    """Whether a measurement's --wandb `mode` sends anything; auto does not without an account."""
    return choose_mode(mode, without_account="off") not in ("off", "disabled")
