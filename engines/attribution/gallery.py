"""A gallery of a detector's surest right and wrong verdicts and of undecided images, with maps."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_grad_cam.utils.image import show_cam_on_image

from dataio.core.errors import UserError
from dataio.loading.crops import center_boxes
from dataio.loading.loader import Loader
from dataio.loading.pixels import normalize, to_pixels
from dataio.loading.training_order import BatchSpec
from dataio.shards.shard_set import ShardSet
from engines.attribution.faithfulness import compare_with_random
from engines.attribution.gradcam import grad_cams, overlay, verdict_score
from engines.checkpoint.contract import check_shards
from engines.checkpoint.load_model import load_model
from engines.config.detector import Config
from engines.evaluate.calibration import calibration_of
from engines.evaluate.predictions import data_info, identities, label_spaces, probability_column
from models.detector.dual_head import DualHead

GalleryOutcome = Literal["right", "wrong", "abstained"]
OUTCOMES: tuple[GalleryOutcome, ...] = ("right", "wrong", "abstained")
_CLIP = 1e-12  # of probabilities, before their logit is taken
_BATCH = 16


@dataclass(frozen=True)
class Choice:
    """A row of the table for the gallery: its verdict ("fake" is what the map explains), and why."""

    row: int
    outcome: GalleryOutcome
    fake: bool


@dataclass(frozen=True)
class GalleryItem:
    """One image of the gallery.

    Attributes:
        sample_id, key, generator, generator_pred, object, p_fake: of the table; p_fake is
            not calibrated, object "" where unknown.
        outcome: of the verdict real or fake; the right verdict may name the wrong generator.
        picture: uint8 [S, S, 3], as the detector sees the image.
        heat: float32 [S, S] in [0, 1], the evidence for the verdict; all zero without any; None
            without a map.
        overlay: uint8 [S, S, 3], the heat over the picture; None where there is no map.
        fake: the verdict that the map explains; of an undecided image the likelier one.
        layer: the layer of the map, by its name in the backbone; "" where there is none.
        reason: why there is no map, where one was wanted.
    """

    sample_id: int
    key: str
    generator: str
    generator_pred: str
    object: str
    p_fake: float
    outcome: GalleryOutcome
    picture: NDArray[np.uint8]
    heat: NDArray[np.float32] | None
    overlay: NDArray[np.uint8] | None
    fake: bool
    layer: str = ""
    reason: str = ""


def choose(table: pa.Table, per_outcome: int) -> list[Choice]:
    """The rows for the gallery: generator by generator, the right, the wrong, the undecided.

    The surest come first: those of the highest P of their verdict; of the undecided, those
    nearest to even odds. Images that are alike in this are taken in the order of their ids.
    Without a calibration the verdict falls at 0.5 and nothing is undecided.

    Args:
        table: see `engines.evaluate.predictions`. per_outcome: the most of each generator and outcome.
    """
    generators, _ = label_spaces(table)
    truth = np.asarray(table["generator"].to_pylist())
    p_fake, p_real = (table[name].to_numpy() for name in ("p_fake", probability_column(generators[0])))
    p, fake, unsure = _verdicts(table, p_fake)
    # The smaller of both probabilities, in which digits are left where the larger is almost 1.
    doubt = np.where(fake, p_real.astype(np.float64), p_fake)
    rank = np.where(unsure, np.abs(p - 0.5), doubt)
    right = fake == (truth != generators[0])
    chosen = []
    for generator in generators:
        for outcome, group in zip(OUTCOMES, (right & ~unsure, ~right & ~unsure, unsure), strict=True):
            rows = np.flatnonzero(group & (truth == generator))
            order = np.lexsort((table["sample_id"].to_numpy()[rows], rank[rows]))
            chosen += [Choice(int(row), outcome, bool(fake[row])) for row in rows[order[:per_outcome]]]
    return chosen


def _verdicts(
    table: pa.Table, p_fake: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Calibrated P(fake) where there is a calibration, verdict "fake", undecided: each [N]."""
    calibration = calibration_of(table)
    if calibration is None:
        return p_fake, p_fake >= 0.5, np.zeros(len(p_fake), bool)
    p = calibration.probability(p_fake)
    unsure = calibration.abstains(p)
    return p, np.where(unsure, p >= 0.5, calibration.calls_fake(p)), unsure


def build_gallery(
    table: pa.Table, data: str, split: str, checkpoint: str, *, per_outcome: int = 2, cam: bool = True
) -> list[GalleryItem]:
    """Choose the images, load them by evaluation's own path, and make their maps.

    Only the chosen images are decoded.

    Args:
        table: predictions of `checkpoint` on `split` of the shards `data`.
        per_outcome: see `choose`. cam: make the maps.

    Raises:
        UserError: a bad checkpoint or bad shards, or a table of other shards, labels or codec policy.
    """
    model, config, info = load_model(checkpoint)
    shards = ShardSet(data, split)
    # Whoever predicted another codec has accepted it, and the table says so.
    accepted = bool(data_info(table).get("codec_differences"))
    check_shards(checkpoint, info, shards, other_codec=accepted)
    _check_same_samples(table, shards)
    chosen = choose(table, per_outcome)
    if not chosen:
        return []
    model = model.to(_device())
    ids = table["sample_id"].to_numpy()[[choice.row for choice in chosen]]
    pixels = torch.cat(list(_load(shards, config, ids)))
    heats, layer, reason = _maps(model, pixels, chosen) if cam else ([None] * len(chosen), "", "")
    pictures = to_pixels(pixels, config.data.mean, config.data.std)
    return [
        _item(table, choice, picture, heat, layer, reason)
        for choice, picture, heat in zip(chosen, pictures, heats, strict=True)
    ]


def faithfulness_of(
    items: Sequence[GalleryItem], checkpoint: str, *, steps: int = 16, most: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Deletion and insertion areas of the gallery's maps and of random ones, as plain values.

    The probability followed is that of the verdict the map explains.

    Args:
        most: images; of more items so many are taken, evenly spread.

    Returns:
        see `engines.attribution.faithfulness.compare_with_random`; and layer, and empty: how many maps
        are left out because nothing speaks for their verdict.
    """
    mapped = [item for item in items if item.heat is not None]
    useful = [item for item in mapped if item.heat is not None and item.heat.any()]
    taken = (
        [useful[i] for i in np.unique(np.linspace(0, len(useful) - 1, most).astype(int))] if useful else []
    )
    about = {"layer": mapped[0].layer if mapped else None, "empty": len(mapped) - len(useful)}
    if not taken:
        reason = "no map of any image" if not mapped else "every map is empty"
        return {"images": 0, "steps": steps, "deletion": None, "insertion": None, "reason": reason, **about}
    model, config, _ = load_model(checkpoint)
    device = _device()
    model = model.to(device)
    images = normalize(
        torch.from_numpy(np.stack([item.picture for item in taken])), config.data.mean, config.data.std
    )
    heat = np.stack([item.heat for item in taken if item.heat is not None])
    fake = torch.tensor([item.fake for item in taken])
    # One map again, for the size it had before it was enlarged.
    cells = grad_cams(model, images[:1], verdict_score(taken[0].fake)).size

    @torch.inference_mode()
    def probability(variants: torch.Tensor) -> torch.Tensor:
        logits = torch.cat([model(part.to(device))[0].cpu() for part in variants.split(_BATCH)])
        p = logits.double().softmax(1)
        return torch.where(fake, p[:, 1:].sum(1), p[:, 0])

    return {**compare_with_random(probability, images, heat, cells=cells, steps=steps, seed=seed), **about}


def describe_item(item: GalleryItem) -> dict[str, Any]:
    """An item for a page: its names and figures; image, heat and overlay as data URIs, "" where none."""
    return {
        "sample_id": item.sample_id,
        "key": item.key,
        "generator": item.generator,
        "generator_pred": item.generator_pred,
        "object": item.object,
        "p_fake": item.p_fake,
        "outcome": item.outcome,
        "verdict": "fake" if item.fake else "real",
        "image": to_data_uri(item.picture),
        "heat": "" if item.heat is None else to_data_uri(colorize(item.heat)),
        "overlay": "" if item.overlay is None else to_data_uri(item.overlay),
        "empty": item.heat is not None and not item.heat.any(),
        "reason": item.reason,
    }


def colorize(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A map in the overlay's colours: float32 [H, W] in [0, 1] to uint8 [H, W, 3]."""
    return show_cam_on_image(np.zeros((*heat.shape, 3), np.float32), heat, use_rgb=True, image_weight=0)


def to_data_uri(picture: NDArray[np.uint8], *, most: int = 256) -> str:
    """A picture, uint8 [H, W, 3], as a JPEG of quality 85 within a page; sides of at most `most` px."""
    image = Image.fromarray(picture)
    image.thumbnail((most, most))
    file = io.BytesIO()
    # A map's colours would bleed in halved chroma.
    image.save(file, "JPEG", quality=85, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _device() -> torch.device:
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _check_same_samples(table: pa.Table, shards: ShardSet) -> None:
    ids, keys = table["sample_id"].to_numpy(), table["key"].to_pylist()
    fitting = len(ids) == 0 or (ids.min() >= 0 and ids.max() < len(shards))
    if (
        not fitting
        or [f"{int(key):09d}" for key in shards.rows[ids]["key"]] != keys
        or _others(table, shards)
    ):
        raise UserError(
            f"{shards.folder}: the {shards.split} split holds other images than the predictions are of; "
            "give the shards and the split that were predicted"
        )


def _others(table: pa.Table, shards: ShardSet) -> bool:
    """Whether the table identifies its images, and they are not those of the shards."""
    column = identities(table)
    # Where images would have to be read for it, their places must do.
    if column is None or {data_info(table).get("identity"), shards.identified_by} != {"source"}:
        return False
    found = shards.identities(table["sample_id"].to_numpy())
    return [row.tobytes().hex() for row in found] != column.to_pylist()


def _load(shards: ShardSet, config: Config, ids: NDArray[np.int64]) -> Iterator[torch.Tensor]:
    """The images in the order of `ids` (int64 [N]), as evaluation sees them: float32 [n, 3, S, S] each."""
    rows = shards.rows[ids]
    boxes, flips = center_boxes(
        config.data.eval_crop, rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    )
    parts = [slice(start, start + _BATCH) for start in range(0, len(ids), _BATCH)]
    work = (BatchSpec(ids[part], boxes[part], flips[part]) for part in parts)
    for batch in Loader(shards, config.data, work, batch=_BATCH, device=_device(), train=False):
        yield batch.image.contiguous().cpu()


def _maps(
    model: DualHead, pixels: torch.Tensor, chosen: Sequence[Choice]
) -> tuple[Sequence[NDArray[np.float32] | None], str, str]:
    """Maps of the verdicts [N], their layer, and the reason where there are none."""
    try:
        maps = grad_cams(model, pixels, [verdict_score(choice.fake) for choice in chosen])
    except UserError as error:
        return [None] * len(chosen), "", str(error).partition(";")[0]
    return list(maps.heat), maps.layer, ""


def _item(
    table: pa.Table,
    choice: Choice,
    picture: NDArray[np.uint8],
    heat: NDArray[np.float32] | None,
    layer: str,
    reason: str,
) -> GalleryItem:
    names = ("sample_id", "key", "generator", "generator_pred", "p_fake")
    values = {name: table[name][choice.row].as_py() for name in names}
    return GalleryItem(
        **values,
        object=table["object"][choice.row].as_py() or "",
        outcome=choice.outcome,
        picture=picture,
        heat=heat,
        overlay=None if heat is None else overlay(picture, heat),
        fake=choice.fake,
        layer=layer,
        reason=reason,
    )
