"""Headers that cannot be read are found before DALI, which would die of them in a large batch."""

import io
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.core.errors import UserError
from dataio.images import headers
from dataio.images.headers import header_fault, header_faults
from dataio.loading.config import DataConfig
from dataio.loading.loader import Loader
from dataio.loading.quarantine import Quarantine
from dataio.loading.training_order import evaluation_specs
from dataio.shards.shard_set import ShardSet


def encoded(kind, mode="RGB", **options):
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"mode": "L"}),
        ("JPEG", {"mode": "CMYK"}),
        ("JPEG", {"subsampling": 0, "quality": 97, "comment": "x" * 300, "restart_marker_blocks": 2}),
        ("PNG", {}),
        ("WEBP", {}),
    ],
)
def test_good_headers_pass(kind, options):
    assert header_fault(encoded(kind, **options)) == ""


def segment(data, marker):
    """Where the first segment of this kind begins."""
    return data.index(bytes([0xFF, marker]))


def changed(data, at, new):
    return data[:at] + bytes(new) + data[at + len(new) :]


def test_damage_is_found_and_said():
    good = encoded("JPEG")
    frame, tables, scan = (segment(good, marker) for marker in (0xC0, 0xDB, 0xDA))
    for bad, told in (
        (bytes(len(good)), "not a readable image format"),
        (b"", "not a readable image format"),
        (encoded("PNG")[:20], "not a readable image format"),
        (good[: scan + 5], "ends in its header"),
        (good[:3], "ends in its header"),
        (changed(good, tables, bytes(40)), f"no JPEG marker at byte {tables}"),
        (changed(good, tables, [0xFF, 0xD9]), f"invalid JPEG marker at byte {tables}"),
        (changed(good, tables + 2, [0, 1]), "invalid JPEG marker"),
        (changed(good, frame + 4, [84]), "invalid frame's header"),
        (changed(good, frame + 5, [0, 0]), "invalid frame's header"),
        (changed(good, frame + 9, [7]), "invalid frame's header"),
        (changed(good, frame + 1, [0xFE]), "without a frame's header"),
    ):
        assert told in header_fault(bad)


def mutated(count):
    """Good headers, repeated, of several kinds and lengths, and the same with bytes changed, cut and moved."""
    kinds: list[dict[str, Any]] = [
        {},
        {"progressive": True},
        {"quality": 97, "subsampling": 0},
        {"mode": "L"},
    ]
    good = [encoded("JPEG", **options) for options in [*kinds, {"comment": "x" * 300}]]
    good.append(encoded("PNG"))
    random = np.random.default_rng(1)
    for _ in range(count):
        data = bytearray(good[random.integers(len(good))])
        end = min(len(data), 900)
        match random.integers(5):
            case 0:
                pass
            case 1:
                for _ in range(random.integers(1, 4)):
                    data[random.integers(end)] = random.integers(256)
            case 2:
                del data[random.integers(end) :]
            case 3:
                place = random.integers(end)
                del data[place : place + random.integers(1, 20)]
            case 4:
                place = random.integers(2, end)
                data[place:place] = bytes([0xFF] * random.integers(1, 4))
        yield np.frombuffer(bytes(data), np.uint8)


def test_remembered_headers_give_the_verdicts_of_each_alone(monkeypatch):
    monkeypatch.setattr(headers, "_good", set())
    monkeypatch.setattr(headers, "_lengths", ())
    images = list(mutated(3000))
    for _ in range(2):  # the second time everything good is remembered
        expected = [
            (place, fault) for place, image in enumerate(images) if (fault := header_fault(image.data))
        ]
        assert list(header_faults(images)) == expected and 500 < len(expected) < 2500
    assert 5 <= len(headers._good) <= 1024 and len(headers._lengths) == 4


def test_a_header_that_passed_is_not_walked_again(monkeypatch):
    images = [np.frombuffer(encoded("JPEG", quality=91), np.uint8)] * 3
    assert list(header_faults(images)) == []
    monkeypatch.setattr(headers, "_checked", None)
    assert list(header_faults(images)) == []


@pytest.fixture
def copy(tiny_shards, tmp_path):
    """Of three images all, the tables or the frame's header is random bytes."""
    shutil.copytree(tiny_shards, tmp_path / "shards")
    shards = ShardSet(tmp_path / "shards", "train")
    for place, cut in ((5, slice(0, None)), (9, slice(10, 80)), (40, slice(158, 170))):
        row, data = shards.rows[place], bytearray(shards.read(place).tobytes())
        data[cut] = np.random.default_rng(place).integers(0, 256, len(data[cut]), np.uint8).tobytes()
        with open(tmp_path / "shards" / shards.shards[int(row["shard"])]["file"], "rb+") as file:
            file.seek(int(row["offset"]))
            file.write(data)
    return tmp_path / "shards"


def load(shards, quarantine=None):
    work = evaluation_specs(shards, DataConfig(size=32), batch=64, rank=0, world=1)
    loader = Loader(
        shards,
        DataConfig(size=32),
        work,
        batch=64,
        device=torch.device("cpu"),
        train=False,
        quarantine=quarantine,
    )
    return torch.cat([batch.sample_id for batch in loader]).tolist()


def test_in_a_large_batch_damage_is_named_and_left_out(copy, tmp_path):
    shards = ShardSet(copy, "train")
    with pytest.raises(
        UserError,
        match=rf"key {int(shards.rows[5]['key']):09d} .*: not a decodable image, .* \(not a readable image format",
    ):
        load(shards)
    quarantine = Quarantine(shards, tmp_path / "list.jsonl", 0.1)
    assert load(shards, quarantine) == [i for i in range(len(shards)) if i not in (5, 9, 40)]
