"""One run of Weights & Biases for one folder; what fails there is a warning and stops nothing.

RUN/wandb.json holds the run's id, which every continuation and every rebuild uses. Nothing here reads
metrics: `engines.runtime.run_log` and `engines.runtime.wandb_rebuild` say what is logged.
"""

import contextlib
import json
import os
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataio.core.atomic import write_text
from dataio.core.errors import one_line
from dataio.core.log import log
from engines.runtime.versions import commit_of, version_of

ID_FILE = "wandb.json"
FACTS = ("code", "data_digest")
"""Of W&B's configuration, what is no key of the run's own."""
_ID_CHARACTERS = string.ascii_lowercase + string.digits
AlertLevel = Literal["ERROR", "WARN"]


def stored_record(folder: Path) -> dict[str, Any]:
    """What RUN/wandb.json holds: id, and the code and data_digest of the last start; {} without the file."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / ID_FILE).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def choose_run_id(
    folder: Path, checkpoints_id: str, environments_id: str, settings: Mapping[str, Any]
) -> str:
    """The id of a folder's run; a new one if it has none and is given none.

    Args:
        checkpoints_id: what a checkpoint of this folder says, for runs begun before there was the file.
        environments_id: WANDB_RUN_ID's, which a sweep's agent sets.
        settings: `code` and `data_digest` of them are stored beside the id.

    Raises:
        OSError: the file cannot be written.
    """
    found = stored_record(folder).get("id") or checkpoints_id or environments_id
    found = str(found or "".join(secrets.choice(_ID_CHARACTERS) for _ in range(8)))
    facts = {key: settings[key] for key in FACTS if key in settings}
    write_text(folder / ID_FILE, json.dumps({"id": found, **facts}) + "\n")
    return found


def code_facts() -> dict[str, str]:
    """What made a run besides its configuration: telltale's version, and the commit where there is one."""
    return {"version": version_of("telltale") or "", "commit": commit_of()}


def _start(chosen: dict[str, Any], mode: str, *, must_be_online: bool) -> Any:
    """W&B's run; offline where the server does not answer, so that its log can be uploaded later."""
    import wandb

    def begin(mode: Any) -> Any:
        settings = wandb.Settings(silent=True, console="off")
        return wandb.init(mode=mode, settings=settings, reinit="create_new", **chosen)

    try:
        return begin(mode)
    except wandb.errors.Error as error:
        if mode != "online" or must_be_online:
            raise
        log.warning(
            f"Weights & Biases could not be started online ({one_line(error)[:200]}); logging offline, for "
            "`telltale wandb sync` later"
        )
        wandb.teardown()  # its process holds the id
        return begin("offline")


@dataclass(frozen=True)
class Picture:
    """A picture in a table: an image file, or pixels as uint8 [height, width, 3]."""

    pixels: Path | NDArray[np.uint8]
    caption: str = ""


class WandbRun:
    """A run of Weights & Biases. No method raises: after a failure all do nothing.

    Args:
        folder: of the run; W&B's files go to its wandb/, and the name is its name.
        mode: of `choose_mode`; "off" makes one that does nothing.
        project, group, job_type: of W&B; an empty group is WANDB_RUN_GROUP's, else `family`, else the folder's name.
        settings: W&B's `config`, nested.
        checkpoints_id: see `choose_run_id`.
        name: of W&B; the default is WANDB_NAME's, else the folder's.
        replaces: start over under the same id, so that what W&B has of it is replaced; otherwise continue.
        files: where W&B writes, instead of `folder`; then it is an error if the server does not answer, which
            otherwise makes the run an offline one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        project: str,
        job_type: str,
        settings: Mapping[str, Any],
        group: str = "",
        family: str = "",
        name: str = "",
        checkpoints_id: str = "",
        replaces: bool = False,
        files: Path | None = None,
    ) -> None:
        self._run: Any = None
        self.id = checkpoints_id
        # Of one run that is logged live, not of what is made from several folders.
        own = {} if replaces else os.environ
        self.name = name or own.get("WANDB_NAME") or folder.resolve().name
        if mode == "off":
            return
        in_sweep = bool(os.environ.get("WANDB_SWEEP_ID"))
        family = family or (folder.resolve().parent.name if in_sweep else folder.resolve().name)
        with self._failure_as_warning("starting Weights & Biases"):
            self.id = choose_run_id(folder, checkpoints_id, own.get("WANDB_RUN_ID", ""), settings)
            chosen = {
                "project": project,
                "name": self.name,
                "group": group or os.environ.get("WANDB_RUN_GROUP") or family,
                "job_type": job_type,
                "dir": str(files or folder),
                "id": self.id,
                # Offline too: the file then says that it continues a run, and `wandb sync` appends it.
                "resume": None if replaces else "allow",
                "config": {**settings},
            }
            self._run = _start(chosen, mode, must_be_online=files is not None)

    @property
    def running(self) -> bool:
        """Whether there is a run, and no call has failed."""
        return self._run is not None

    @property
    def offline_folder(self) -> Path | None:
        """Where an offline run is written; None for another."""
        if self._run is None or not self._run.settings._offline:
            return None
        return Path(self._run.settings.sync_dir)

    @contextlib.contextmanager
    def _failure_as_warning(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning(f"{what} failed ({error}); going on without it")
            self._run = None

    def define(self, *patterns: str) -> None:
        """Draw the metrics of these names (a last * stands for any ending) against `step`."""
        if self._run is None:
            return
        with self._failure_as_warning("defining metrics of Weights & Biases"):
            self._run.define_metric("step", hidden=True)
            for pattern in patterns:
                self._run.define_metric(pattern, step_metric="step")

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row; unknown values (None) are left out."""
        if self._run is None:
            return
        with self._failure_as_warning("logging to Weights & Biases"):
            known = {key: value for key, value in values.items() if value is not None}
            self._run.log(known if step is None else {**known, "step": step}, step=step)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set what the table of runs shows; unknown values (None) are left out."""
        if self._run is None:
            return
        with self._failure_as_warning("logging to Weights & Biases"):
            self._run.summary.update({key: value for key, value in values.items() if value is not None})

    def picture(self, name: str, path: Path, step: int | None = None, caption: str | None = None) -> None:
        """Log the image file at `path` as images/NAME."""
        if self._run is None:
            return
        with self._failure_as_warning("sending an image to Weights & Biases"):
            import wandb

            self.log({f"images/{name}": wandb.Image(str(path), caption=caption)}, step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None = None
    ) -> None:
        """Log a table; a cell may be a `Picture`."""
        if self._run is None:
            return
        with self._failure_as_warning("sending a table to Weights & Biases"):
            import wandb

            def cell(value: Any) -> Any:
                if not isinstance(value, Picture):
                    return value
                pixels = str(value.pixels) if isinstance(value.pixels, Path) else value.pixels
                return wandb.Image(pixels, caption=value.caption or None)

            data = [[cell(value) for value in row] for row in rows]
            self.log({name: wandb.Table(columns=list(columns), data=data)}, step)

    def page(self, name: str, path: Path) -> None:
        """Log the HTML page at `path`."""
        if self._run is None:
            return
        with self._failure_as_warning("sending a page to Weights & Biases"):
            import wandb

            self._run.log({name: wandb.Html(str(path))})

    def alert(self, title: str, text: str, level: AlertLevel = "ERROR") -> None:
        """Send a message to whoever the account's settings name; at most one of a title in a minute."""
        if self._run is None:
            return
        with self._failure_as_warning("alerting by Weights & Biases"):
            self._run.alert(title[:63], text, level=level)

    def artifact(
        self, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any], *, used: bool
    ) -> None:
        """Record files as an artifact by reference: their paths and sizes, nothing is uploaded or read.

        Args:
            kind: W&B's type, such as model or dataset. files: by name; folders count with all in them.
            used: an input of the run. Offline W&B knows outputs only, and it is recorded as one.
        """
        if self._run is None or not files:
            return
        with self._failure_as_warning("recording an artifact in Weights & Biases"):
            import wandb

            artifact = wandb.Artifact(f"{kind}-{self.id}", kind, metadata=dict(metadata))
            for name, path in files.items():
                artifact.add_reference(path.resolve().as_uri(), name=name, checksum=False)
            if used and self.offline_folder is None:
                self._run.use_artifact(artifact)
            else:
                self._run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        """Finish the run; with another code than 0 W&B calls it failed."""
        if self._run is not None:
            with self._failure_as_warning("closing Weights & Biases"):
                self._run.finish(exit_code=exit_code)
