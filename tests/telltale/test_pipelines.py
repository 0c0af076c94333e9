"""telltale.webdataset: every kind of tar, read by the library, has the samples that our reader has."""

import io
import json
import pickle
import shutil
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

import telltale
from dataio.images.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.manifest import ManifestLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.job import write_shards
from dataio.shards.remote_cache import CACHE_VARIABLE
from dataio.vqa.conversations import read_conversations, read_image_bytes
from tests.remote_servers import HttpServer, forget_clients

FORMATS = {
    "JPEG": ("jpg", "jpg"),
    "PNG": ("png", "png"),
    "WEBP": ("webp", "webp"),
    "BMP": ("bmp", "bmp"),
    "GIF": ("gif", "png"),  # which training cannot decode
}  # of a source: its extension, and that of its member in shards of --codec.preset keep


def write_kept(folder):
    """Shards of files that are stored as they are, in every format, with objects by name and none."""
    rng = np.random.default_rng(0)
    lines = ["path,generator,object,split"]
    for number in range(40):
        form, (extension, _) = list(FORMATS.items())[number % len(FORMATS)]
        path = f"{number}.{extension}"
        coarse = rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((30 + number % 3, 24), Image.Resampling.BICUBIC).save(
            folder / path, form
        )
        thing = ("cat", "dog", "")[number % 3]
        lines.append(
            f"{path},{'nature' if number % 2 else 'adm'},{thing},{'train' if number < 30 else 'val'}"
        )
    (folder / "list.csv").write_text("\n".join(lines))
    layout = ManifestLayout(folder / "list.csv", root=folder)
    write_shards(layout, folder / "shards", preset_policy("keep"), samples_per_shard=12, quiet=True)
    return folder / "shards"


def write_by_several_workers(folder, preset="default"):
    write_synthetic(folder / "source", images=70, size=32, seed=5)
    layout = GenImageLayout(folder / "source", val_fraction=0.2)
    policy = preset_policy(preset, 32)
    write_shards(layout, folder / "shards", policy, workers=2, samples_per_shard=9, quiet=True)
    return folder / "shards"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, tiny_shards):
    """One shard folder of each kind."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("kept", "workers", "reference")}
    return {
        "default": tiny_shards,
        "kept": write_kept(folders["kept"]),
        "workers": write_by_several_workers(folders["workers"]),
        "reference": write_by_several_workers(folders["reference"], "reference"),
    }


@pytest.mark.parametrize("kind", ["default", "kept", "workers", "reference"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_kind_of_tar_has_the_labels_and_bytes_that_our_reader_has(kinds, kind, split):
    ours = telltale.open_shards(kinds[kind], split)
    theirs = list(telltale.webdataset(kinds[kind], split, image="bytes"))
    plain = list(wds.WebDataset([sample["__url__"] for sample in theirs[:1]], shardshuffle=False))
    assert len(theirs) == len(ours) > 5 and len(plain) == ours.shard_sizes[0]
    for number, (row, sample) in enumerate(zip(ours.rows, theirs, strict=True)):
        assert sample["image"] == ours.read(number).tobytes()
        assert (sample["generator"], sample["object"]) == (row["generator"], row["object"])
        assert ours.labels.generators[sample["generator"]] == sample["generator_name"]
        assert sample["object_name"] == ("" if row["object"] < 0 else ours.labels.objects[row["object"]])
        assert sample["__key__"] == f"{row['key']:09d}" and sample["source"] == ours.about(number)["source"]
        assert ours.describe(number) == f"{sample['__url__']} key {sample['__key__']}"
    for raw, sample in zip(plain, theirs, strict=False):  # without our pipeline too
        assert sample["image"] in raw.values() and raw["__key__"] == sample["__key__"]


def test_the_kept_files_are_of_several_formats_and_the_workers_did_several_shards(kinds):
    names = Counter[str]()
    for tar in (kinds["kept"] / "train").glob("*.tar"):
        for sample in wds.WebDataset(str(tar), shardshuffle=False):
            names.update(name for name in sample if not name.startswith("__"))
    assert set(names) == {"json", *(member for _, member in FORMATS.values())}
    assert len(list((kinds["workers"] / "train").glob("*.tar"))) > 4
    known = [sample["object"] for sample in telltale.webdataset(kinds["kept"], "train", image="bytes")]
    assert set(known) == {-1, 0, 1}


def test_images_are_what_pillow_shows_in_both_forms(kinds):
    for kind in ("default", "kept"):
        names = {name: ("image", "__key__") for name in ("bytes", "pil", "tensor")}
        forms = [
            list(telltale.webdataset(kinds[kind], "val", image=name, fields=fields))
            for name, fields in names.items()
        ]
        for (data, key), (picture, second), (pixels, third) in zip(*forms, strict=True):
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert key == second == third and picture.mode == "RGB"
            assert np.array_equal(np.asarray(picture), expected)
            assert pixels.dtype == torch.uint8 and np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def keys(pipeline):
    return [sample[0] for sample in pipeline]


def opened(folder, **options):
    return telltale.webdataset(folder, "train", image="bytes", fields=("__key__",), **options)


def test_nodes_and_workers_share_the_shards_and_know_how_many_samples_they_get(kinds, monkeypatch):
    folder = kinds["workers"]
    everything, shards = keys(opened(folder)), len(telltale.open_shards(folder, "train").shard_sizes)
    assert len(opened(folder)) == len(everything)
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        pipeline = opened(folder)
        loader = DataLoader(pipeline, batch_size=None, num_workers=2)
        parts.append(keys(loader))
        assert len(loader) == len(pipeline) == len(parts[-1]) > 0
        assert sorted(parts[-1]) == sorted(keys(pipeline))
        equal = wds.WebLoader(pipeline, batch_size=4, num_workers=2).with_epoch(9)
        assert len(list(equal)) == 9  # whatever the process has
    assert sorted(key for part in parts for key in part) == everything  # each once
    pipeline = opened(folder)
    monkeypatch.setenv("WORLD_SIZE", str(shards + 1))
    with pytest.raises(telltale.UserError, match=rf"{shards} shards for {shards + 1} processes"):
        opened(folder)
    with pytest.raises(telltale.UserError, match=r"processes.*smaller --samples-per-shard"):
        next(iter(pipeline))


def test_an_epoch_is_shuffled_anew_and_repeats_with_its_seeds(kinds):
    plain = keys(opened(kinds["workers"]))

    def two_epochs(seed, workers, persistent=False):
        torch.manual_seed(7)
        pipeline = opened(kinds["workers"], shuffle=15, seed=seed)
        if not workers:
            return keys(pipeline), keys(pipeline)
        loader = DataLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=persistent)
        return keys(loader), keys(loader)

    for workers, persistent in ((0, False), (2, False), (2, True)):
        first, second = two_epochs(1, workers, persistent)
        assert sorted(first) == sorted(second) == plain
        assert first != second != plain != first
        assert two_epochs(1, workers, persistent) == (first, second) != two_epochs(2, workers, persistent)
    assert [key for key in keys(opened(kinds["workers"], shuffle=1)) if key in plain[:9]] == plain[:9]


def test_stages_may_be_added_and_the_length_is_kept_only_where_it_is_known(kinds):
    pipeline = telltale.webdataset(kinds["default"], "val", image="tensor", fields=("image", "object"))
    mapped = pipeline.map(lambda sample: (sample[0] / 255, sample[1]))
    assert len(mapped) == len(pipeline) == len(list(mapped))
    batches = mapped.batched(4)
    with pytest.raises(TypeError, match="set it by with_length"):
        len(batches)
    shapes = [images.shape for images, _ in batches]
    assert shapes[0] == (4, 3, 32, 32) and sum(shape[0] for shape in shapes) == len(pipeline)
    assert len(list(pipeline.repeat(2))) == 2 * sum(shape[0] for shape in shapes)
    with pytest.raises(TypeError, match="length is unknown"):
        len(pipeline)
    again = pickle.loads(pickle.dumps(opened(kinds["default"])))  # as workers that are spawned get it
    assert keys(again) == keys(opened(kinds["default"])) and len(again) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "no split 'tset'; there are train, val, test"),
        ({"image": "numpy"}, "image numpy: expected one of pil, tensor, bytes"),
        ({"fields": ("image", "label")}, "fields label: expected some of image, generator"),
        ({"fields": "image"}, r"fields image: expected a sequence of names such as \('image',\)"),
        ({"shuffle": -1}, "shuffle -1: expected 0 or more"),
        ({"seed": -1}, "seed -1: expected 0 or more"),
    ],
)
def test_bad_arguments_are_one_line(tiny_shards, options, message):
    with pytest.raises(telltale.UserError, match=message):
        telltale.webdataset(tiny_shards, **options)


def test_a_missing_folder_or_kind_of_url_is_one_line(tmp_path):
    with pytest.raises(telltale.UserError, match="nowhere: no such folder of shards"):
        telltale.webdataset(tmp_path / "nowhere")
    with pytest.raises(telltale.UserError, match="ftp://host/set: unknown kind of URL"):
        telltale.webdataset("ftp://host/set")


def test_what_is_damaged_is_named_and_can_be_skipped(kinds, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(kinds["workers"], folder)
    ours, sizes = telltale.open_shards(folder, "train"), telltale.open_shards(folder, "train").shard_sizes
    tars = [folder / shard["file"] for shard in ours.shards]

    def damage(number, value=0):
        row = ours.rows[number]
        data = bytearray(tars[row["shard"]].read_bytes())
        begin = int(row["offset"]) if value else int(row["offset"]) - 512
        data[begin : begin + 100] = bytes([value]) * 100
        tars[row["shard"]].write_bytes(data)

    damage(2, 7)  # the image
    with pytest.raises(telltale.UserError, match=r"train/000000\.tar key \d+: not a readable image .*verify"):
        list(telltale.webdataset(folder, "train"))
    damage(int(sizes[0]) + 3)  # a header
    damage(int(sizes[:2].sum()))  # the first one, which the library takes for an empty tar's end
    with pytest.warns(UserWarning, match="verify") as warned:
        kept = list(telltale.webdataset(folder, "train", handler=wds.warn_and_continue))
    assert len(kept) == sizes.sum() - 1 - (sizes[1] - 3) - sizes[2]
    assert [str(one.message).count("/train/00000") for one in warned] == [1, 1, 1]
    tars[3].write_bytes(tars[3].read_bytes()[:-512])
    with pytest.raises(telltale.UserError, match=r"train/000003\.tar: .*truncated"):
        opened(folder)


def test_shards_behind_a_url_are_read_through_copies(kinds, tmp_path, monkeypatch):
    if find_spec("aiohttp") is None:
        pytest.skip("reading http:// needs aiohttp: pip install 'telltale[http]'")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    forget_clients()
    shutil.copytree(kinds["workers"], tmp_path / "disk" / "set")
    server = HttpServer(tmp_path / "disk")
    try:
        pipeline = telltale.webdataset(
            f"{server.url}/set", "train", fields=("__key__", "image"), image="bytes"
        )
        expected = list(
            telltale.webdataset(kinds["workers"], "train", fields=("__key__", "image"), image="bytes")
        )
        assert list(pipeline) == list(pipeline) == expected
        loader: DataLoader = DataLoader(pipeline, batch_size=None, num_workers=2)
        assert sorted(tuple(sample) for sample in loader) == expected
        asked = {path: count for path, count in server.asked.items() if path.endswith(".tar")}
        assert len(asked) == len(telltale.open_shards(kinds["workers"], "train").shards)
        assert set(asked.values()) == {1}  # two epochs and two workers later
        forget_clients()
        tar = sorted((tmp_path / "disk" / "set" / "train").glob("*.tar"))[-1]
        tar.write_bytes(tar.read_bytes()[:-1] + b"x")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "other"))
        with pytest.raises(
            telltale.UserError, match=rf"/set/train/{tar.name}: .*SHA-256 is not the manifest's"
        ):
            list(telltale.webdataset(f"{server.url}/set", "train", image="bytes"))
    finally:
        server.shutdown()
        server.server_close()


def test_the_library_reads_conversation_tars_as_finetuning_does(tmp_path):
    source = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 40)).save(source, "PNG")
    for number in range(2):
        with wds.TarWriter(str(tmp_path / f"{number:06d}.tar")) as tar:
            for key in range(3):
                turns = [("human", "<image>\nReal?" if key else "What?"), ("gpt", f"Fake {number} {key}.")]
                record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
                image = {"png": source.getvalue()} if key else {}
                tar.write({"__key__": f"{key:09d}", "json": json.dumps(record).encode(), **image})
    ours, rejected = read_conversations(tmp_path)
    theirs = list(wds.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False))
    assert len(ours) == len(theirs) == 6 and not rejected
    for mine, sample in zip(ours, theirs, strict=True):
        said = [turn["value"] for turn in json.loads(sample["json"])["conversations"]]
        assert tuple(said) == mine.turns[0] and mine.id.endswith(sample["__key__"])
        assert (None if mine.image is None else read_image_bytes(mine.image)) == sample.get("png")
