"""The gallery: which images are chosen, that they are what evaluation saw, and their maps."""

import base64
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.core.errors import UserError
from dataio.shards.manifest import read_manifest
from dataio.shards.shard_set import ShardSet
from engines.attribution.gallery import build_gallery, choose, describe_item, faithfulness_of, to_data_uri
from engines.attribution.gradcam import grad_cams, verdict_score
from engines.checkpoint import files as checkpoints
from engines.checkpoint.load_model import load_model
from engines.config.detector import from_dict
from engines.evaluate.predictions import PredictionArrays, build_table
from engines.evaluate.split_inference import predict_split
from models.detector.dual_head import DualHead


def table_of(p_fake, generator, calibration=None, ids=None):
    """Predictions of images by nature and two generators; p_fake is shared out among these."""
    p, count = np.asarray(p_fake, np.float64), len(p_fake)
    arrays = PredictionArrays(
        sample_id=np.arange(count),
        key=[f"{number:09d}" for number in range(count)],
        generator=np.asarray(generator),
        object=np.full(count, -1),
        generator_probability=np.stack([1 - p, p * 0.75, p * 0.25], axis=1),
        object_top5=np.zeros((count, 1), np.int64),
        generators=["nature", "adm", "glide"],
        objects=["cat"],
        checkpoint={"calibration": calibration} if calibration else {},
    )
    return build_table(arrays)


def chosen(table, per_outcome=2):
    generators = table["generator"].to_pylist()
    return [
        (generators[one.row], one.outcome, one.row, one.fake)
        for one in choose(table, per_outcome=per_outcome)
    ]


def test_the_surest_right_and_wrong_of_each_generator():
    table = table_of([0.1, 0.2, 0.3, 0.9, 0.8, 0.6, 0.7, 0.4], [0, 0, 0, 0, 1, 1, 1, 1])
    assert chosen(table) == [
        ("nature", "right", 0, False),
        ("nature", "right", 1, False),
        ("nature", "wrong", 3, True),
        ("adm", "right", 4, True),
        ("adm", "right", 6, True),
        ("adm", "wrong", 7, False),
    ]
    assert [row for _, _, row, _ in chosen(table, 1)] == [0, 3, 4, 7]
    assert chosen(table, 0) == []


def test_the_right_verdict_may_name_the_wrong_generator():
    # adm is the likelier name of both, glide the true one of the second.
    assert chosen(table_of([0.9, 0.9], [1, 2])) == [("adm", "right", 0, True), ("glide", "right", 1, True)]


def test_ties_fall_to_the_lower_id_and_not_where_digits_still_tell_them_apart():
    assert [row for _, _, row, _ in chosen(table_of([0.9] * 5, [1] * 5))] == [0, 1]
    p = 1 - np.array([1e-9, 1e-9, 1e-12, 1e-11])
    assert [row for _, _, row, _ in chosen(table_of(p, [1] * 4))] == [2, 3]


def test_with_a_calibration_the_band_is_undecided_and_probabilities_are_calibrated():
    calibration = {
        "temperature": 2.0,
        "shift": 1.0,
        "threshold": 0.8,
        "unsure": [0.4, 0.8],
        "false_alarm_rate": 0.01,
    }
    # Calibrated: sigmoid((logit(p) + 1) / 2).
    p = [0.05, 0.3, 0.5, 0.85, 0.99, 0.15]
    calibrated = 1 / (1 + np.exp(-(np.log(np.divide(p, np.subtract(1, p))) + 1) / 2))
    np.testing.assert_allclose(calibrated, [0.274, 0.519, 0.622, 0.797, 0.943, 0.409], atol=1e-3)
    table = table_of(p, [0] * 6, calibration)
    assert chosen(table, 3) == [
        ("nature", "right", 0, False),
        ("nature", "wrong", 4, True),
        ("nature", "abstained", 1, True),
        ("nature", "abstained", 5, False),
        ("nature", "abstained", 2, True),
    ]
    no_band = table_of(p, [0] * 6, {**calibration, "unsure": [0.8, 0.8], "false_alarm_rate": 0.01})
    assert {outcome for _, outcome, _, _ in chosen(no_band, 9)} == {"right", "wrong"}
    for damaged in ({"threshold": 0.5}, {**calibration, "unsure": None}, {**calibration, "shift": "much"}):
        with pytest.raises(UserError, match="calibration of their checkpoint is damaged") as caught:
            choose(table_of(p, [0] * 6, damaged), 2)
        assert "\n" not in str(caught.value)


def write_checkpoint(path, shards, backbone, generators=None):
    manifest = read_manifest(shards)
    labels = {"generators": generators or manifest["generators"], "objects": manifest["objects"]}
    config = {"model": {"backbone": backbone}, "data": {"size": 32, "eval_crop": 0.75}}  # 24 px, enlarged
    torch.manual_seed(0)
    model = DualHead(from_dict(config).model, labels["generators"], labels["objects"], image_size=32)
    state = {
        "format": checkpoints.FORMAT,
        "version": checkpoints.VERSION,
        "step": 5,
        "model": checkpoints.cpu_state(model),
        "labels": labels,
        "codec": manifest["codec"],
        "layout": manifest["layout"],
        "config": config,
    }
    checkpoints.save(path, state)
    return str(path)


@pytest.fixture(scope="module")
def work(tiny_shards, tmp_path_factory):
    """A checkpoint and its predictions, calibrated so that every verdict occurs."""
    path = write_checkpoint(tmp_path_factory.mktemp("gallery") / "best.pt", tiny_shards, "cifarnet_narrow")
    arrays = predict_split(path, str(tiny_shards), "train", batch=32)
    assert arrays is not None
    low, high = np.quantile(1 - arrays.generator_probability[:, 0], [0.3, 0.7])
    calibration = {
        "temperature": 1.0,
        "shift": 0.0,
        "threshold": high,
        "unsure": [low, high],
        "false_alarm_rate": 0.01,
    }
    arrays = replace(arrays, checkpoint={**arrays.checkpoint, "calibration": calibration})
    return path, build_table(arrays)


@pytest.fixture(scope="module")
def gallery(work, tiny_shards):
    path, table = work
    return build_gallery(table, str(tiny_shards), "train", path, per_outcome=1)


def test_items_are_the_tables_rows_and_their_pictures_what_evaluation_saw(work, gallery):
    path, table = work
    assert {item.outcome for item in gallery} == {"right", "wrong", "abstained"}
    assert {item.generator for item in gallery} == set(table["generator"].to_pylist())
    places = [(item.generator, item.outcome) for item in gallery]
    assert len(set(places)) == len(places)
    model, config, _ = load_model(path)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))
    for item in gallery:
        row = table["sample_id"].to_pylist().index(item.sample_id)
        for name in ("key", "generator", "generator_pred", "p_fake"):
            assert getattr(item, name) == table[name][row].as_py()
        assert item.object == (table["object"][row].as_py() or "")
        assert item.picture.shape == (32, 32, 3) and item.picture.dtype == np.uint8
        pixels = (torch.from_numpy(item.picture).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            p = model(pixels[None])[0].double().softmax(1)[0]
        assert float(p[1:].sum()) == pytest.approx(item.p_fake, abs=1e-4)
        if item.outcome != "abstained":
            assert (item.fake == (item.generator != "nature")) == (item.outcome == "right")
        heat = grad_cams(model, pixels[None], verdict_score(item.fake)).heat[0]
        assert item.heat is not None and item.heat.dtype == np.float32
        np.testing.assert_allclose(item.heat, heat, atol=1e-3)
        assert item.overlay is not None and item.overlay.shape == (32, 32, 3)
        assert item.layer == "block3" and item.reason == ""


def test_only_the_chosen_images_are_read(work, gallery, tiny_shards, tmp_path):
    path, table = work
    shutil.copytree(tiny_shards, tmp_path / "shards")
    shards = ShardSet(tmp_path / "shards", "train")
    wanted = {item.sample_id for item in gallery}
    for number, row in enumerate(shards.rows):
        if number not in wanted:
            with open(shards.folder / shards.shards[int(row["shard"])]["file"], "r+b") as file:
                file.seek(int(row["offset"]))
                file.write(bytes(int(row["size"])))
    found = build_gallery(table, str(tmp_path / "shards"), "train", path, per_outcome=1, cam=False)
    assert [item.sample_id for item in found] == [item.sample_id for item in gallery]
    for one, other in zip(found, gallery, strict=True):
        assert np.array_equal(one.picture, other.picture)
        assert one.heat is None and one.overlay is None and one.layer == "" and one.reason == ""


def test_faithfulness_is_of_the_maps_that_are_shown(work, gallery):
    path, _ = work
    found = faithfulness_of(gallery, path, steps=2, most=3)
    useful = [item for item in gallery if item.heat.any()]
    assert found["images"] == min(3, len(useful)) and found["empty"] == len(gallery) - len(useful)
    assert found["layer"] == "block3" and found["steps"] == 2
    for name in ("deletion", "insertion"):
        low, high = found[name]["interval"]
        assert 0 < found[name]["map"] < 1 and low <= found[name]["difference"] <= high
    assert faithfulness_of(gallery, path, steps=2, most=3) == found
    # Other maps, other areas.
    other = [replace(item, heat=np.ascontiguousarray(item.heat[::-1])) for item in gallery]
    assert faithfulness_of(other, path, steps=2, most=3)["deletion"]["map"] != found["deletion"]["map"]

    blank = [replace(item, heat=np.zeros_like(item.heat)) for item in gallery[:2]]
    nothing = faithfulness_of(blank, path)
    assert (nothing["images"], nothing["empty"], nothing["reason"]) == (0, 2, "every map is empty")
    nothing = faithfulness_of([replace(item, heat=None) for item in gallery], path)
    assert nothing["deletion"] is None and nothing["reason"] == "no map of any image"


def test_a_transformer_has_pictures_without_maps_and_the_reason(work, tiny_shards, tmp_path):
    _, table = work
    path = write_checkpoint(tmp_path / "vit.pt", tiny_shards, "timm:test_vit")
    items = build_gallery(table, str(tiny_shards), "train", path, per_outcome=1)
    assert items and all(item.heat is None and item.overlay is None for item in items)
    assert all(item.reason.startswith("Grad-CAM needs a convolutional backbone") for item in items)
    assert describe_item(items[0])["heat"] == describe_item(items[0])["overlay"] == ""


def test_a_table_of_other_images_or_labels_is_one_line(work, tiny_shards, tmp_path):
    path, table = work
    with pytest.raises(UserError, match="other images than the predictions") as caught:
        build_gallery(table, str(tiny_shards), "test", path)
    assert "\n" not in str(caught.value)
    other = write_checkpoint(tmp_path / "other.pt", tiny_shards, "cifarnet_narrow", ["nature", "sora"])
    with pytest.raises(UserError, match=r"label space of generators is .*sora"):
        build_gallery(table, str(tiny_shards), "train", other)


def test_an_item_becomes_plain_values_with_pictures_that_open(gallery):
    found = describe_item(gallery[0])
    assert found["key"] == gallery[0].key and found["outcome"] == gallery[0].outcome
    for name in ("image", "heat", "overlay"):
        assert opened(found[name]).size == (32, 32)
    assert found["empty"] == (not gallery[0].heat.any()) and found["verdict"] in ("fake", "real")


def opened(uri):
    head, _, code = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(code)))


def test_a_data_uri_is_the_picture_made_small():
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (64, 64, 3)).copy()
    assert np.abs(np.asarray(opened(to_data_uri(ramp))).astype(int) - ramp).mean() < 3
    large = to_data_uri(np.random.default_rng(0).integers(0, 256, (600, 300, 3), np.uint8))
    assert opened(large).size == (128, 256)
