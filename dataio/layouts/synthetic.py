"""A small GenImage drawn on the spot: ten objects, four generators with fingerprints.

For the quickstart, tests and benchmarks. A "photograph" is a noisy scene; a "generator"
is the same kind of scene passed through what real generators leave traces of: an
upsampler, a transposed convolution's checkerboard, a codebook. Everything else (object,
color, size of the square, JPEG history) is drawn alike for both.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataio.core.atomic import sync_folder, write_text
from dataio.core.errors import UserError
from dataio.layouts.genimage import OPTIONS, GenImageLayout, imagenet_classes, labels_of_name
from dataio.layouts.registry import register_layout

# Real ImageNet classes, so that names parse as GenImage's do; what is drawn is a shape.
CLASSES = (1, 9, 130, 277, 414, 472, 555, 812, 950, 985)
GENERATORS = ("adm", "big_gan", "glide", "vqdm")
DEFAULT_VAL_FRACTION = 0.10
# Bytes, generator's folder, shape, whether fake.
_Drawn = tuple[bytes, str, int, bool]
TEST_SHARE = 6  # every sixth image goes to the official "val", which is the test split
_FOLDERS = {
    "adm": "ADM/imagenet_ai_0508_adm",
    "big_gan": "BigGAN/imagenet_ai_0419_biggan",
    "glide": "glide/imagenet_glide",
    "vqdm": "VQDM/imagenet_ai_0419_vqdm",
}
_MARK = "synthetic.json"

Float = NDArray[np.float64]


def _shape_mask(kind: int, size: tuple[int, int], rng: np.random.Generator) -> Float:
    """Coverage of one of ten shapes, float [H, W] in 0..1."""
    height, width = size
    side = min(size)
    radius = side * rng.uniform(0.22, 0.38)
    cy, cx = (n / 2 + rng.uniform(-0.12, 0.12) * n for n in size)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    angle = rng.uniform(0, 0.5)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    distance = np.hypot(u, v)
    period = radius * rng.uniform(0.5, 0.7)
    inside_square = np.maximum(abs(u), abs(v)) - radius
    edges = [
        distance - radius,  # disc
        inside_square,  # square
        np.maximum(abs(u) * 1.73 + v, -v) - radius * 0.8,  # triangle
        abs(distance - radius) - radius * 0.22,  # ring
        np.maximum(np.minimum(abs(u), abs(v)) - radius * 0.25, inside_square),  # cross
        np.maximum(abs(v) - radius * 0.2, abs(u) - radius * 1.3),  # bar
        np.where(inside_square < 0, np.sin(u * 2 * np.pi / period) * 2, 1),  # stripes
        np.where(inside_square < 0, np.sin(u * np.pi / period) * np.sin(v * np.pi / period) * 4, 1),  # checks
        np.hypot(u % (2 * period) - period, v % (2 * period) - period) - period * 0.6,  # dots everywhere
        np.maximum(distance - radius, -v),  # half disc
    ]
    return np.clip(0.5 - edges[kind], 0, 1)


def draw_scene(kind: int, size: tuple[int, int], rng: np.random.Generator) -> Float:
    """One scene, float [H, W, 3] in 0..255: a shaded background, a shape, sensor noise.

    Args:
        kind: 0..9, the shape. size: (height, width), pixels.
    """
    height, width = size
    back, front = rng.uniform(30, 225, 3), rng.uniform(30, 225, 3)
    if abs(back - front).max() < 70:
        front = (front + 128) % 255
    ramp = np.linspace(-1, 1, width)[None, :] * rng.uniform(-25, 25)
    ramp = ramp + np.linspace(-1, 1, height)[:, None] * rng.uniform(-25, 25)
    mask = _shape_mask(kind, size, rng)[:, :, None]
    image = back * (1 - mask) + front * mask + ramp[:, :, None]
    return np.clip(image + rng.normal(0, rng.uniform(7, 11), (height, width, 3)), 0, 255)


def _resize(image: Float, side: int, how: Image.Resampling) -> Float:
    picture = Image.fromarray(image.round().astype(np.uint8))
    return np.asarray(picture.resize((side, side), how), dtype=np.float64)


def apply_generator(image: Float, generator: str, rng: np.random.Generator) -> Float:
    """Leave a generator's trace on a square scene, float [S, S, 3] in 0..255."""
    side = image.shape[0]
    if generator == "big_gan":  # nearest-neighbour upsampling from half the size
        return _resize(_resize(image, side // 2, Image.Resampling.BOX), side, Image.Resampling.NEAREST)
    if generator == "glide":  # bilinear upsampling, then sharpening
        smooth = _resize(_resize(image, side // 2, Image.Resampling.BOX), side, Image.Resampling.BILINEAR)
        blurred = _resize(_resize(smooth, side // 4, Image.Resampling.BOX), side, Image.Resampling.BILINEAR)
        return np.clip(smooth + 0.6 * (smooth - blurred), 0, 255)
    if generator == "adm":  # the uneven overlap of a strided transposed convolution
        y, x = np.mgrid[:side, :side]
        overlap = np.where((y % 3 == 0) ^ (x % 3 == 0), 1.12, 0.96)
        return np.clip(image * overlap[:, :, None], 0, 255)
    # vqdm: 4x4 patches keep their mean and one of few textures, as a codebook's entries do
    blocks = image[: side // 4 * 4, : side // 4 * 4].reshape(side // 4, 4, side // 4, 4, 3)
    mean = blocks.mean((1, 3), keepdims=True)
    codes = np.array([[[1, -1], [-1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]]], np.float64)
    texture = np.kron(codes[rng.integers(0, 3, (side // 4, side // 4))], np.ones((1, 1, 2, 2)))
    patched = mean + 14 * texture.transpose(0, 2, 1, 3)[..., None]
    result = image.copy()
    result[: side // 4 * 4, : side // 4 * 4] = patched.reshape(side // 4 * 4, side // 4 * 4, 3)
    return np.clip(result, 0, 255)


def _encode(image: Float, is_fake: bool, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image.round().astype(np.uint8))
    if is_fake:
        picture.save(buffer, "PNG", compress_level=1)
    else:
        quality = int(rng.choice([75, 85, 90, 92, 95, 96, 96, 96, 98]))
        picture.save(buffer, "JPEG", quality=quality, subsampling=int(rng.choice([0, 2, 2])))
    return buffer.getvalue()


def _file_name(generator: str, kind: int, number: int, is_fake: bool, is_test: bool, wnids: list[str]) -> str:
    label = CLASSES[kind]
    if not is_fake:
        return f"ILSVRC2012_val_{number:08d}.JPEG" if is_test else f"{wnids[label]}_{number}.JPEG"
    return {
        "adm": f"{label}_adm_{number}.PNG",
        "big_gan": f"{label:03d}_biggan_{number:05d}.png",
        "glide": f"GLIDE_1000_200_{number % 8:02d}_{label:03d}_glide_{number:05d}.png",
        "vqdm": f"VQDM_1000_200_{number % 8:02d}_{label:03d}_vqdm_{number:05d}.png",
    }[generator]


def draw_image(number: int, size: int, seed: int) -> _Drawn:
    """Image `number` of a set: its bytes, its generator's folder, its shape, whether fake."""
    # One generator per image: any subset, in any process, gives the same pixels.
    rng = np.random.Generator(np.random.PCG64([seed, number]))
    is_fake = number % 2 == 1
    generator = GENERATORS[number // 2 % len(GENERATORS)]
    kind = int(rng.integers(len(CLASSES)))
    if is_fake:
        image = apply_generator(draw_scene(kind, (size, size), rng), generator, rng)
    else:
        longer = size + int(rng.integers(0, size // 2 + 1))
        image = draw_scene(kind, (size, longer) if rng.random() < 0.7 else (longer, size), rng)
    return _encode(image, is_fake, rng), generator, kind, is_fake


def write_synthetic(
    folder: str | Path, *, images: int, size: int = 64, seed: int = 0, workers: int = 1
) -> bool:
    """Draw a synthetic GenImage into `folder`, completely or not at all.

    Args:
        folder: gets GenImage's layout and LOC_val_solution.csv. images: how many, half of
            them photographs. size: side, pixels (photographs' shortest side). seed: any.
        workers: processes that draw; the files are the same.

    Returns:
        False where a complete set of the same parameters was there already.

    Raises:
        UserError: the folder holds something else, cannot be written, or the parameters
            are out of range.
    """
    folder = Path(folder)
    if images < 20 or size < 16:
        raise UserError(
            f"expected at least 20 images of at least 16 px, not {images} of {size} px", field="synthetic"
        )
    parameters = {"version": 1, "images": images, "size": size, "seed": seed}
    if _is_there(folder, parameters):
        return False
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with _drawing(images, size, seed, workers) as drawn:
            _write_all(part, drawn)
        write_text(part / _MARK, json.dumps(parameters) + "\n")
        os.rename(part, folder)
        sync_folder(folder.parent)
    except OSError as error:
        if _is_there(folder, parameters):  # another process was faster
            return False
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _is_there(folder: Path, parameters: dict[str, int]) -> bool:
    """Whether `folder` is the set of these parameters; False where it is absent or empty.

    Raises:
        UserError: it is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        stored = json.loads((folder / _MARK).read_text())
        differing = [
            f"{name} {stored[name]}, not {parameters[name]}"
            for name in parameters
            if stored[name] != parameters[name]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        differing = ["something else"]
    if differing:
        raise UserError(f"{folder}: holds {', '.join(differing)}; remove it or choose another folder")
    return True


@contextmanager
def _drawing(images: int, size: int, seed: int, workers: int) -> Iterator[Iterator[_Drawn]]:
    """The images in their order."""
    draw = partial(draw_image, size=size, seed=seed)
    if workers == 1:
        yield map(draw, range(images))
        return
    # Spawned, not forked: the parent may have threads (DALI, torch).
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield pool.map(draw, range(images), chunksize=16)


def _write_all(folder: Path, drawn: Iterator[_Drawn]) -> None:
    wnid_of = {index: wnid for wnid, index in imagenet_classes()[0].items()}
    wnids = [wnid_of[index] for index in range(1000)]
    truth = ["ImageId,PredictionString"]
    for generator in GENERATORS:
        for part in ("train/ai", "train/nature", "val/ai", "val/nature"):
            (folder / _FOLDERS[generator] / part).mkdir(parents=True)
    for number, (data, generator, kind, is_fake) in enumerate(drawn):
        is_test = number // (2 * len(GENERATORS)) % TEST_SHARE == TEST_SHARE - 1
        name = _file_name(generator, kind, number, is_fake, is_test, wnids)
        if is_test and not is_fake:
            truth.append(f"{name.removesuffix('.JPEG')},{wnids[CLASSES[kind]]} 0 0 1 1")
        place = (
            folder / _FOLDERS[generator] / ("val" if is_test else "train") / ("ai" if is_fake else "nature")
        )
        (place / name).write_bytes(data)
    (folder / "LOC_val_solution.csv").write_text("\n".join(truth) + "\n")


@register_layout(
    "synthetic",
    options=OPTIONS,
    val_fraction=DEFAULT_VAL_FRACTION,
    labels_of_name=labels_of_name,
    counting="classes",
)
class SyntheticLayout(GenImageLayout):
    """GenImage's layout over what `write_synthetic` drew."""

    name = "synthetic"
