"""The synthetic GenImage: reproducible, in the official layout, and a fair problem."""

import hashlib
import io
import json
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.codec import encode, preset_policy
from dataio.images.stored import jpeg_history
from dataio.layouts import open_layout
from dataio.layouts.synthetic import CLASSES, GENERATORS, draw_image, write_synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "set"
    assert write_synthetic(path, images=960, size=64, seed=3)
    return path


def digests(folder: Path) -> dict[str, str]:
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_it_is_genimage_with_known_objects(folder):
    layout = open_layout("synthetic", folder)
    records = list(layout.records())
    assert layout.name == "synthetic" and layout.notes == [] and layout.object_in_json == "index"
    plain = open_layout("genimage", folder, val_fraction=0.1)
    assert list(plain.records()) == records and plain.generators == layout.generators
    assert len(records) == 960 and {r.object for r in records} == set(CLASSES)
    assert len(CLASSES) >= 10 and len(GENERATORS) >= 4
    counts = Counter(r.generator for r in records)
    assert counts == {"nature": 480} | {generator: 480 // len(GENERATORS) for generator in GENERATORS}
    assert {r.subset for r in records} == set(GENERATORS)
    for split in ("train", "val", "test"):
        own = [r for r in records if r.split == split]
        assert 0.3 < sum(r.generator == "nature" for r in own) / len(own) < 0.7
        assert {r.generator for r in own} == {"nature", *GENERATORS}
    assert sum(r.split == "test" for r in records) / 960 > 0.1


def test_names_are_the_official_ones(folder):
    paths = "\n".join(digests(folder))
    for pattern in (
        r"ADM/imagenet_ai_0508_adm/train/ai/\d{1,3}_adm_\d+\.PNG",
        r"BigGAN/imagenet_ai_0419_biggan/val/ai/\d{3}_biggan_\d{5}\.png",
        r"glide/imagenet_glide/train/ai/GLIDE_1000_200_\d\d_\d{3}_glide_\d{5}\.png",
        r"VQDM/imagenet_ai_0419_vqdm/train/ai/VQDM_1000_200_\d\d_\d{3}_vqdm_\d{5}\.png",
        r"VQDM/imagenet_ai_0419_vqdm/train/nature/n\d{8}_\d+\.JPEG",
        r"glide/imagenet_glide/val/nature/ILSVRC2012_val_\d{8}\.JPEG",
        r"LOC_val_solution\.csv",
    ):
        assert re.search(f"^{pattern}$", paths, re.MULTILINE), pattern


def test_containers_are_genimages(folder):
    """Square PNGs against JPEGs of many sizes, as published: removing that is the codec policy's task."""
    qualities, sizes = set(), set()
    for record in open_layout("synthetic", folder).records():
        with Image.open(folder / record.path) as image:
            assert image.mode == "RGB"
            if record.generator == "nature":
                assert image.format == "JPEG" and min(image.size) == 64
                qualities.add(tuple(image.quantization[0]))  # type: ignore[attr-defined]
                sizes.add(image.size)
            else:
                assert (image.format, image.size) == ("PNG", (64, 64))
    assert len(qualities) >= 5 and len(sizes) >= 20


def test_the_same_seed_gives_the_same_bytes_in_any_process(folder, tmp_path):
    again = tmp_path / "again"
    write_synthetic(again, images=48, size=64, seed=3)
    first, whole = digests(again), digests(folder)
    images = {path for path in first if path.lower().endswith(("png", "jpeg"))}
    assert len(images) == 48  # image n does not depend on how many there are
    assert {path: first[path] for path in images} == {path: whole[path] for path in images}
    write_synthetic(tmp_path / "together", images=48, size=64, seed=3, workers=2)
    assert digests(tmp_path / "together") == first
    numbers = list(range(40))
    serial = [draw_image(n, 48, 5) for n in numbers]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(partial(draw_image, size=48, seed=5), reversed(numbers))) == serial[::-1]
    assert draw_image(0, 48, 6)[0] != serial[0][0]
    assert len({data for data, *_ in serial}) == len(serial)


def test_a_complete_set_is_reused_and_another_is_refused(folder, tmp_path):
    before = digests(folder)
    assert not write_synthetic(folder, images=960, size=64, seed=3)
    with pytest.raises(UserError, match="holds images 960, not 24, seed 3, not 4; remove") as error:
        write_synthetic(folder, images=24, size=64, seed=4)
    assert "size" not in str(error.value) and str(folder) in str(error.value)
    assert digests(folder) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("dear")
    with pytest.raises(UserError, match="something else"):
        write_synthetic(other, images=24, size=32, seed=0)
    (other / "synthetic.json").write_text("{")
    with pytest.raises(UserError, match="something else"):
        write_synthetic(other, images=24, size=32, seed=0)
    assert (other / "mine.txt").read_text() == "dear"
    with pytest.raises(UserError, match="something else"):
        write_synthetic(other / "mine.txt", images=24, size=32, seed=0)


def test_an_empty_folder_is_filled_and_parameters_are_stored(tmp_path):
    (tmp_path / "set").mkdir()
    assert write_synthetic(tmp_path / "set", images=24, size=32, seed=0)
    stored = json.loads((tmp_path / "set" / "synthetic.json").read_text())
    assert stored.items() >= {"images": 24, "size": 32, "seed": 0}.items()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    import dataio.layouts.synthetic as module

    def fail_at_ten(number: int, size: int, seed: int) -> tuple[bytes, str, int, bool]:
        if number == 10:
            raise OSError(28, "No space left on device")
        return draw_image(number, size, seed)

    monkeypatch.setattr(module, "draw_image", fail_at_ten)
    with pytest.raises(UserError, match=r"set: cannot be written .*No space left"):
        write_synthetic(tmp_path / "set", images=24, size=32, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("images, size", [(0, 64), (19, 64), (100, 8)])
def test_parameters_out_of_range(tmp_path, images, size):
    with pytest.raises(UserError, match=r"synthetic: expected at least 20 images"):
        write_synthetic(tmp_path / "set", images=images, size=size, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [16, 33, 96])
def test_any_size(size):
    for number in range(40):
        data, _, _, is_fake = draw_image(number, size, 0)
        image = Image.open(io.BytesIO(data))
        assert min(image.size) == size and (not is_fake or image.size == (size, size))
        assert np.asarray(image).std() > 5


def detector_sees(images: list[bytes], history: dict[str, int]) -> np.ndarray:
    """Log spectra of luminance after the default codec policy, float [N, 256]: 2x2 frequencies pooled."""
    policy = replace(preset_policy("default", 64), history=history)
    decoded = (Image.open(io.BytesIO(encode(data, policy).data)).convert("L") for data in images)
    pixels = np.stack([np.asarray(image, dtype=np.float64) for image in decoded])
    spectra = np.abs(np.fft.rfft2(pixels - pixels.mean((1, 2), keepdims=True)))[:, :, 1:] + 1
    return np.log(spectra.reshape(len(images), 32, 2, 16, 2).mean((2, 4))).reshape(len(images), -1)


def linear_scores(features: np.ndarray, targets: np.ndarray, train: int) -> np.ndarray:
    """Ridge regression on the first `train` rows; float [N - train, K] scores of the others."""
    x = (features - features[:train].mean(0)) / (features[:train].std(0) + 1e-9)
    x = np.c_[x, np.ones(len(x))]
    weights = np.linalg.solve(
        x[:train].T @ x[:train] + 100 * np.eye(x.shape[1]), x[:train].T @ targets[:train]
    )
    return x[train:] @ weights


def test_fingerprints_survive_the_codec_and_nothing_else_tells_photographs(monkeypatch):
    """A linear rule on spectra finds fakes and generators; without the generators' pass, it finds nothing."""
    import dataio.layouts.synthetic as module

    count, train = 1600, 1000
    drawn = [draw_image(number, 64, 9) for number in range(count)]
    images, is_fake = [image[0] for image in drawn], np.array([image[3] for image in drawn])
    labels = np.array([1 + GENERATORS.index(name) if fake else 0 for _, name, _, fake in drawn])
    history = Counter(found for data in images if (found := jpeg_history(data)))
    sign = is_fake[:, None] * 2.0 - 1  # half are fakes: an uninformed rule errs on half
    seen = detector_sees(images, history)
    assert np.mean((linear_scores(seen, sign, train)[:, 0] > 0) != is_fake[train:]) < 0.05
    found = linear_scores(seen, np.eye(1 + len(GENERATORS))[labels], train).argmax(1)
    wrong = [np.mean(found[labels[train:] == label] != label) for label in range(1 + len(GENERATORS))]
    assert np.mean(wrong) < 0.1

    monkeypatch.setattr(module, "apply_generator", lambda image, generator, rng: image)
    fakes = np.flatnonzero(is_fake)
    plain = detector_sees([draw_image(int(number), 64, 9)[0] for number in fakes], history)
    control = seen.copy()
    control[fakes] = plain
    assert np.mean((linear_scores(control, sign, train)[:, 0] > 0) != is_fake[train:]) > 0.42
