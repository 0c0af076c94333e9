"""The protocols: their cells, and the computation of one cell."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataio.core.cores import available_cores
from dataio.core.errors import UserError
from dataio.layouts import open_layout
from dataio.layouts.base import Layout
from dataio.perturb.aligned_views import (
    LEFT_OUT,
    Degraded,
    HistoryMatched,
    JpegAll,
    JpegFakes,
    SizeMatched,
    View,
    history_of,
    smallest_side,
)
from dataio.perturb.originals import KeptLayout, Originals, choose_originals
from dataio.sharding.history import HISTORY_SAMPLE
from dataio.sharding.job import write_shards
from dataio.shards.manifest import LabelSpaces, label_mismatch, read_manifest, sha256_of
from engines.config.protocol import TRAINED, ProtocolConfig, to_plain
from engines.evaluate.evaluate import METRICS, evaluate_checkpoint

SHARDS = "shards"  # of a cell, in its folder


@dataclass(frozen=True)
class Cell:
    """One evaluation of a protocol: its name (also its folder's) and its condition."""

    name: str
    about: dict[str, Any] = field(default_factory=dict)


class Protocol(ABC):
    """A validated protocol: its cells, and the computation of one.

    Attributes:
        config: as parsed. cells: in the order of the result.
        settings: everything the results depend on, as JSON values.
        checkpoint: file, SHA-256, step and codec, for protocols that evaluate one checkpoint.
    """

    config: ProtocolConfig
    cells: list[Cell]
    settings: dict[str, Any]
    checkpoint: dict[str, Any] | None = None

    @abstractmethod
    def run(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """Compute a cell in its folder.

        Returns:
            metrics, per_generator and counts, see `summarize_metrics`, and values of its own.

        Raises:
            UserError: the cell cannot be computed.
        """


def open_protocol(config: ProtocolConfig) -> Protocol:
    """Validate a protocol before its first cell.

    Raises:
        UserError: a bad checkpoint, originals, shards or training configuration.
    """
    return TrainingProtocol(config) if config.protocol in TRAINED else ViewProtocol(config)


class ViewProtocol(Protocol):
    """robustness and aligned: one checkpoint, one set of originals, a view for each cell."""

    def __init__(self, config: ProtocolConfig) -> None:
        # Imports torch, which the encoding processes must not.
        from engines.checkpoint.contract import trained_policy
        from engines.checkpoint.load_model import load_model

        self.config = config
        _, _, info = load_model(config.checkpoint)
        self.policy = trained_policy(info["codec"], config.checkpoint)
        layout = _open_originals(config)
        mismatch = label_mismatch(
            info["labels"], LabelSpaces(tuple(layout.generators), tuple(layout.objects))
        )
        if mismatch:
            raise UserError(
                f"{config.checkpoint}: its {mismatch} ({layout.root}); give originals of the same label space"
            )
        self.originals: Originals = choose_originals(layout, config.split, config.images, config.seed)
        file = Path(config.checkpoint)
        digest = sha256_of(file / "model.safetensors" if file.is_dir() else file)
        self.checkpoint = {"file": file.name, "sha256": digest, "step": info["step"], "codec": info["codec"]}
        self.settings = {**to_plain(config), "checkpoint": digest}
        self.cells = self._cells()

    def _cells(self) -> list[Cell]:
        config = self.config
        if config.protocol == "aligned":
            return [Cell(view, {"view": view}) for view in dict.fromkeys(["raw", *config.views])]
        cells = [Cell("raw")]
        for name, operation in config.all_operations().items():
            about = {"operation": operation.family, "severity": operation.severity}
            cells.append(Cell(name, {**about, "genimage": True} if name != str(operation) else about))
        return cells + [Cell(f"chain-{n}", {"operation": "chain", "severity": n}) for n in config.chains]

    def run(self, cell: Cell, folder: Path) -> dict[str, Any]:
        view, more = self._view(cell)
        shards = folder / SHARDS
        manifest = write_shards(
            self.originals.through(view),
            shards,
            self.policy,
            workers=self.config.workers or available_cores(),
            samples_per_shard=self.config.samples_per_shard,
            extra_settings={"cell": cell.name},
            quiet=True,
            allow_duplicates=True,
            allow_one_class=True,  # what a protocol measures on fakes alone is its own decision
        )
        metrics = evaluate_checkpoint(
            checkpoint=self.config.checkpoint,
            data=str(shards),
            split=self.config.split,
            output=str(folder),
            batch=self.config.batch or None,
        )
        assert metrics is not None, "there is one process"
        result = summarize_metrics(metrics)
        reasons = [entry["reason"] for entry in manifest["rejected"]]
        left_out = Counter(r.removeprefix(LEFT_OUT) for r in reasons if r.startswith(LEFT_OUT))
        result["counts"] |= {
            "left_out": left_out.total(),
            "unreadable": len(reasons) - left_out.total(),
        }
        return {**result, **more, "left_out": dict(sorted(left_out.items()))}

    def _view(self, cell: Cell) -> tuple[View, dict[str, Any]]:
        """The cell's view, and the measured parameters it was made from."""
        config, about = self.config, cell.about
        if cell.name == "raw":
            return Degraded(), {}
        if config.protocol == "robustness":
            if about["operation"] == "chain":
                return Degraded(chain=about["severity"], seed=config.seed), {}
            return Degraded((config.all_operations()[cell.name],), seed=config.seed), {}
        if cell.name == "history":
            history = history_of(self.originals.sources(limit=HISTORY_SAMPLE))
            return HistoryMatched(history), {"history": history}
        if cell.name == "size":
            side = config.size or smallest_side(self.originals.sources(fakes_only=True))
            return SizeMatched(side), {"side": side}
        return (JpegFakes if cell.name == "jpeg_fakes" else JpegAll)(config.quality, config.subsampling), {}


def _open_originals(config: ProtocolConfig) -> Layout:
    if config.shards:
        return KeptLayout(config.shards, config.split)
    return open_layout(
        config.layout,
        config.source,
        val_labels=config.val_labels or None,
        root=config.root or None,
        real=config.real or None,
        skip_unknown=config.skip_unknown,
        subsets=config.subsets,
        split_from_path=config.split_from_path,
        halve_test=config.halve_test,
    )


class TrainingProtocol(Protocol):
    """cross_generator and leave_one_out: a training for each cell, all tested on one split."""

    def __init__(self, config: ProtocolConfig) -> None:
        self.config = config
        manifest = read_manifest(config.shards)
        known = LabelSpaces.of(manifest).generators
        chosen = config.generators or _with_images(manifest, "train")[1:]
        for name in chosen:
            if name not in known[1:]:
                raise UserError(
                    f"generators: no generator {name!r} in {config.shards}; there are {', '.join(known[1:])}"
                )
            for split in ("train", config.split):
                if name not in _with_images(manifest, split):
                    raise UserError(
                        f"generators: {name} has no images in the {split} split of {config.shards}"
                    )
        if config.protocol == "leave_one_out" and len(chosen) < 2:
            raise UserError(
                f"generators: leave_one_out needs two or more, found {', '.join(chosen) or 'none'}"
            )
        if not chosen:
            raise UserError(f"generators: no generator has images in the train split of {config.shards}")
        self.generators = list(chosen)
        self.settings = {**to_plain(config), "generators": self.generators}
        self.cells = [Cell(*self._trained_on(name)) for name in self.generators]
        self._check_flags()

    def _trained_on(self, name: str) -> tuple[str, dict[str, Any]]:
        if self.config.protocol == "cross_generator":
            return name, {"train": [name]}
        others = [other for other in self.generators if other != name]
        return f"without_{name}", {"train": others, "held_out": name}

    def _check_flags(self) -> None:
        """Parse the trainings' configuration before the first of them."""
        from engines.config.detector import parse_config
        from engines.experiments.grid import Combination
        from engines.runtime.paths import find_config

        flags = Combination("", self._settings(self.cells[0])).flags()
        parse_config(
            [flag for flag in flags if not flag.startswith("--config=")],
            find_config(self.config.config),
        )

    def _settings(self, cell: Cell) -> dict[str, Any]:
        chosen = {"data.shards": self.config.shards, "data.generators": cell.about["train"]}
        return {"config": self.config.config, **self.config.flags, **chosen}

    def run(self, cell: Cell, folder: Path) -> dict[str, Any]:
        from engines.experiments.grid import Combination, run_combination

        run = folder / "run"
        row = run_combination(
            Combination(cell.name, self._settings(cell)),
            run,
            [],
            self.config.processes,
            self.config.split,
            self.config.weights,
            group=folder.resolve().parents[1].name,
        )
        if row["failure"]:
            raise UserError(row["failure"])
        return summarize_metrics(json.loads((run / "evaluation" / METRICS).read_text()))


def _with_images(manifest: dict[str, Any], split: str) -> list[str]:
    if split not in manifest["splits"]:
        raise UserError(f"split: no split {split!r}; there are {', '.join(manifest['splits'])}")
    return [name for name, count in manifest["splits"][split]["generators"].items() if count]


def summarize_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The part of metrics.json that a protocol keeps.

    Returns:
        metrics: auroc, ap, accuracy, balanced_accuracy (mean of the accuracies on real and
            on fake), accuracy_real, accuracy_fake, generator_error.
        per_generator: for each generator with images, against nature: n, auroc, ap,
            accuracy, balanced_accuracy, accuracy_fake.
        counts: images, real, fake.
        All are fractions, at P(fake) >= 0.5; None where it cannot be computed.
    """
    overall, counts = metrics["overall"], metrics["counts"]
    real = overall["accuracy_real"]
    summary = {
        key: overall[key] for key in ("auroc", "ap", "accuracy_real", "accuracy_fake", "generator_error")
    }
    summary["accuracy"] = _complement(overall["real_fake_error"])
    summary["balanced_accuracy"] = _mean(real, overall["accuracy_fake"])
    per_generator = {}
    for name, values in list(metrics["per_generator"].items())[1:]:
        if values["n"] == 0:
            continue
        accuracy_fake = _complement(values["real_fake_error"])
        both = values["n"] + counts["real"]
        per_generator[name] = {
            "n": values["n"],
            "auroc": values["auroc"],
            "ap": values["ap"],
            "accuracy": None
            if real is None or accuracy_fake is None
            else (accuracy_fake * values["n"] + real * counts["real"]) / both,
            "balanced_accuracy": _mean(real, accuracy_fake),
            "accuracy_fake": accuracy_fake,
        }
    return {
        "metrics": summary,
        "per_generator": per_generator,
        "counts": {key: counts[key] for key in ("images", "real", "fake")},
    }


def _complement(error: float | None) -> float | None:
    return None if error is None else 1 - error


def _mean(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else (first + second) / 2
