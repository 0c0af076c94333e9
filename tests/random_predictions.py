"""Predictions that several test files share."""

from typing import Any

import numpy as np

from engines.evaluate.predictions import PredictionArrays

GENIMAGE = (
    "nature",
    "adm",
    "big_gan",
    "glide",
    "midjourney",
    "stable_diffusion_1_4",
    "stable_diffusion_1_5",
    "vqdm",
    "wukong",
)
CALIBRATION = {
    "temperature": 1.7,
    "shift": -0.6,
    "threshold": 0.72,
    "unsure": [0.4, 0.72],
    "false_alarm_rate": 0.01,
}


def make_arrays(
    generator: Any,
    probability: Any,
    object: Any = None,
    top5: Any = None,
    generators: tuple[str, ...] = GENIMAGE,
    objects: int = 12,
) -> PredictionArrays:
    count = len(generator)
    width = min(5, objects)
    return PredictionArrays(
        sample_id=np.arange(count),
        key=[str(i) for i in range(count)],
        generator=np.asarray(generator, np.int64),
        object=np.full(count, -1) if object is None else np.asarray(object, np.int64),
        generator_probability=np.asarray(probability, np.float64).reshape(count, len(generators)),
        object_top5=np.tile(np.arange(width), (count, 1)) if top5 is None else np.asarray(top5),
        generators=generators,
        objects=[f"object {i}" for i in range(objects)],
    )


def random_arrays(count: int, seed: int, objects: int = 12, levels: int = 0) -> PredictionArrays:
    """Predictions that are right more often than not; `levels` makes many equal scores."""
    random = np.random.default_rng(seed)
    generator = random.integers(0, len(GENIMAGE), count)
    logits = random.normal(size=(count, len(GENIMAGE)))
    logits[np.arange(count), generator] += random.normal(1.5, 1, count)
    if levels:
        logits = np.round(logits * levels) / levels
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    top5 = np.stack([random.permutation(objects)[:5] for _ in range(count)])
    known = random.random(count) < 0.7
    # Half of the known objects are guessed right at once.
    object = np.where(random.random(count) < 0.5, top5[:, 0], random.integers(0, objects, count))
    return make_arrays(generator, probability, np.where(known, object, -1), top5, objects=objects)
