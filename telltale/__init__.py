"""Score images with a trained detector, explain its answers, and evaluate it, from Python.

    import telltale

    detector = telltale.load("runs/quickstart")
    for row in detector.predict(["photo.jpg", "folder/"]):
        print(row.path, row.verdict, row.p_fake)

Public names; each is imported when it is first used, so that `import telltale` is cheap:

* `load`: a detector from a run folder, a checkpoint or an export.
* `ImageDetector`: what `load` returns; predicts and explains images.
* `ImagePrediction`, `Predictions`: the answer for one image, and for all of a call.
* `ImageExplanation`: the heat map of one image.
* `open_shards`: one split of a folder of shards.
* `webdataset`, `ShardPipeline`: one split as a pipeline of the webdataset library, for other trainers.
* `evaluate`, `Evaluation`: metrics and predictions of a checkpoint on a split.
* `UserError`: every mistake of a caller, in one line.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataio.core.errors import UserError
    from telltale.detector import ImageDetector, ImageExplanation, load
    from telltale.evaluation import Evaluation, evaluate, open_shards
    from telltale.pipelines import ShardPipeline, webdataset
    from telltale.results import ImagePrediction, Predictions

__all__ = [
    "Evaluation",
    "ImageDetector",
    "ImageExplanation",
    "ImagePrediction",
    "Predictions",
    "ShardPipeline",
    "UserError",
    "evaluate",
    "load",
    "open_shards",
    "webdataset",
]

_HOME = {
    "Evaluation": "telltale.evaluation",
    "ImageDetector": "telltale.detector",
    "ImageExplanation": "telltale.detector",
    "ImagePrediction": "telltale.results",
    "Predictions": "telltale.results",
    "ShardPipeline": "telltale.pipelines",
    "UserError": "dataio.core.errors",
    "evaluate": "telltale.evaluation",
    "load": "telltale.detector",
    "open_shards": "telltale.evaluation",
    "webdataset": "telltale.pipelines",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("telltale")
    if name not in _HOME:
        raise AttributeError(f"module 'telltale' has no attribute {name!r}")
    # Kept in the module, so that the next use does not come here.
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
