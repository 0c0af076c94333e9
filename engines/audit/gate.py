"""The audit that lies beside shards, as training reads it."""

from pathlib import Path
from typing import Any

from dataio.core.errors import UserError
from dataio.core.versioned_json import read_versioned_json
from dataio.shards.manifest import sha256_of
from dataio.sources.remote_path import RemotePath, is_url, place_of

FORMAT, VERSION = "telltale-audit", 1
AUDIT = "audit.json"


def read_audit(path: str | Path | RemotePath) -> dict[str, Any]:
    """An audit's JSON.

    Raises:
        UserError: missing, unreadable, or of another format or version.
    """
    try:
        return read_versioned_json(path, FORMAT, (VERSION,), "audit again", what="an audit")
    except FileNotFoundError:
        raise UserError(f"{path}: no such audit; make one with `telltale audit`") from None


def audit_line(shards: str | Path, *, required: bool) -> str:
    """One line on the audit of a shard folder, for the start of a training run.

    Args:
        required: refuse to go on without a current audit of the training split that is no fail.

    Raises:
        UserError: it is required, and missing, stale, of other splits, or a fail.
    """
    folder = place_of(shards)
    beside = f" --output {AUDIT}` and upload it to {shards}" if is_url(shards) else "`"
    again = f"`telltale audit --shards {shards}{beside}"
    if not (folder / AUDIT).is_file():
        trouble, verdict = f"none of {shards}", ""
    else:
        try:
            audit = read_audit(folder / AUDIT)
            verdict = f"{audit['verdict']}: {'; '.join(audit['short']) or 'no leak found'}"
            if audit["source"]["manifest_sha256"] != sha256_of(folder / "manifest.json"):
                trouble = f"{folder / AUDIT} is of other shards than those that lie there now"
            elif "train" not in audit["splits"]:
                trouble = f"{folder / AUDIT} is of {', '.join(audit['splits'])} only, not of train"
            else:
                trouble = ""
        except (UserError, KeyError, TypeError) as error:
            trouble, verdict = f"{folder / AUDIT} is unreadable ({type(error).__name__})", ""
    if trouble and required:
        raise UserError(f"data.require_audit: {trouble}; run {again}")
    if trouble:
        return f"audit: {trouble}; run {again}"
    if required and audit["verdict"] == "fail":
        raise UserError(
            f"data.require_audit: the audit of {shards} is a {verdict} (see {folder / AUDIT}); shard the source "
            "again under another --codec.preset, or train with --data.require_audit false"
        )
    return f"audit: {verdict} ({folder / AUDIT})"
