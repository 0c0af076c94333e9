"""Figures of a run: its inputs, its hardest mistakes, the confusion of generators, its curves.

Each is written to RUN/images first and sent to Weights & Biases second. Rank 0 only;
nothing here has state that a resumed run would miss.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import ConfusionMatrixDisplay

from dataio.core.atomic import write_with
from dataio.loading.loader import Batch
from dataio.loading.pixels import to_pixels
from dataio.shards.manifest import LabelSpaces
from engines.config.detector import Config
from engines.runtime.run_log import RunLog
from engines.runtime.wandb_run import Picture
from engines.train.validate import Validation

_CURVES = ("loss", "generator_error", "real_fake_error", "object_error")


class RunFigures:
    """Draws a run's figures.

    Args:
        folder: of the run; figures go to its images/. labels: names on the axes.
        log: passes them on to Weights & Biases.
    """

    def __init__(self, folder: Path, config: Config, labels: LabelSpaces, log: RunLog) -> None:
        self.folder, self.config, self.labels, self.log = folder, config, labels, log

    def inputs(self, batch: Batch, step: int) -> None:
        """The first training images, as the network sees them, with their labels."""
        captions = [
            self._generator(generator) + (f"\n{self.labels.objects[label]}" if label >= 0 else "")
            for generator, label in zip(batch.generator.tolist(), batch.object_label.tolist(), strict=True)
        ]
        self._save(
            "inputs",
            _grid(list(to_pixels(batch.image, self.config.data.mean, self.config.data.std)), captions),
            step,
        )

    def validation(self, result: Validation, step: int) -> None:
        """The confusion matrix and the hardest mistakes of a validation."""
        figure = Figure(figsize=_side(len(self.labels.generators)), layout="constrained")
        rows = result.confusion / np.maximum(1, result.confusion.sum(1, keepdims=True))
        display = ConfusionMatrixDisplay(rows, display_labels=list(self.labels.generators))
        display.plot(
            ax=figure.subplots(),
            xticks_rotation="vertical",
            values_format=".0%",
            cmap="Blues",
            colorbar=False,
            im_kw={"vmin": 0, "vmax": 1},
        )
        figure.suptitle(f"validation, step {step}\nshare of each generator's images")
        self._save("confusion", figure, step)
        if result.mistakes:
            captions = [
                f"{self._generator(m.truth)}\nsaid {self._generator(m.answer)}\nP(fake) {m.p_fake:.2f}"
                for m in result.mistakes
            ]
            self._save("mistakes", _grid([m.image for m in result.mistakes], captions), step)
            rows = [
                [
                    Picture(m.image),
                    m.sample_id,
                    self._generator(m.truth),
                    self._generator(m.answer),
                    m.p_fake,
                    m.loss,
                ]
                for m in result.mistakes
            ]
            columns = ["picture", "sample id", "generator", "predicted", "P(fake)", "loss"]
            self.log.table("mistakes", columns, rows, step)

    def curves(self) -> None:
        """Loss and errors of training and validation over the steps, from metrics.jsonl."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        figure = Figure(figsize=(12, 3), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
            for kind in ("train", "val"):
                points = [
                    (line["step"], line[name])
                    for line in lines
                    if line["kind"] == kind and line.get(name) is not None
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), label=kind, marker="." if kind == "val" else "")
            axes.set(title=name.replace("_", " ").replace("real fake", "real/fake"), xlabel="step")
            axes.set_ylim(bottom=0)
        figure.axes[0].legend()
        self._save("curves", figure, lines[-1]["step"] if lines else 0)

    def _generator(self, number: int) -> str:
        return self.labels.generators[number]

    def _save(self, name: str, figure: Figure, step: int) -> None:
        path = self.folder / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        FigureCanvasAgg(figure)
        write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
        self.log.picture(name, path, step)


def _side(classes: int) -> tuple[float, float]:
    return (2.5 + 0.55 * classes, 2.2 + 0.55 * classes)


def _grid(images: list[NDArray[np.uint8]], captions: list[str], columns: int = 8) -> Figure:
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.4 * min(columns, len(images)), 2.0 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, min(columns, len(images)), squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for axes, image, caption in zip(panels.flat, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=7)
    return figure
