"""GenImage and CIFAKE: every name gives the right generator, object and split."""

import csv
import multiprocessing
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.layouts import open_layout
from dataio.layouts.base import Layout, Record
from dataio.layouts.genimage import GENERATORS, imagenet_classes, is_known_broken
from dataio.layouts.synthetic import write_synthetic

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def listed(name: str, source: Path, **options) -> dict[str, Record]:
    records = list(open_layout(name, source, **options).records())
    by_path = {record.path: record for record in records}
    assert len(by_path) == len(records)
    return by_path


# -- ImageNet's classes --------------------------------------------------------------------------------


def test_the_class_list_is_complete_sorted_and_unique():
    wnids, names = imagenet_classes()
    assert len(wnids) == len(names) == len(set(names)) == 1000
    assert list(wnids) == sorted(wnids)
    assert list(wnids.values()) == list(range(1000))
    assert wnids["n01440764"] == 0 and wnids["n15075141"] == 999
    known = {0: "tench", 277: "red fox", 414: "backpack", 472: "canoe", 489: "chainlink fence", 608: "jean"}
    assert {index: names[index] for index in known} == known


# -- GenImage ------------------------------------------------------------------------------------------


def test_label_order_is_the_references():
    others = ["adm", "big_gan", "glide", "midjourney", "stable_diffusion_1_4", "stable_diffusion_1_5"]
    assert list(GENERATORS) == ["nature", *others, "vqdm", "wukong"]


def test_every_real_file_has_its_true_generator_and_object(shared_data):
    source = shared_data / "genimage-mini"
    layout = open_layout("genimage", source, val_labels=shared_data / "genimage-mini-LOC_val_solution.csv")
    records = {record.path: record for record in layout.records()}
    with open(shared_data / "genimage-mini-truth.csv", newline="") as file:
        truth = {row["path"]: (row["generator"], int(row["object"])) for row in csv.DictReader(file)}
    assert len(truth) == 413
    # Three broken files are listed too: whether an image decodes is found out when it is read.
    assert len(records) == 416 and set(truth) < set(records)
    assert {path: (records[path].generator, records[path].object) for path in truth} == truth
    assert layout.object_in_json == "index" and layout.notes == [] and layout.skipped == []
    assert all((r.split == "test") == ("/val/" in r.path) for r in records.values())
    assert {r.subset for r in records.values()} == set(GENERATORS[1:])
    for path in truth:
        assert layout.read(path) == (source / path).read_bytes()


def test_one_generators_folder_alone_and_subsets_agree_with_the_whole(shared_data):
    source = shared_data / "genimage-mini"
    labels = shared_data / "genimage-mini-LOC_val_solution.csv"
    subset = listed("genimage", source, val_labels=labels, subsets=["vqdm"])
    whole = {p: r for p, r in listed("genimage", source, val_labels=labels).items() if p.startswith("VQDM/")}
    assert subset == whole and {r.subset for r in subset.values()} == {"vqdm"}
    for top in ("VQDM", "VQDM/imagenet_ai_0419_vqdm"):
        alone = listed("genimage", source / top, val_labels=labels)
        assert {f"{top}/{path}": (r.generator, r.object, r.split) for path, r in alone.items()} == {
            path: (r.generator, r.object, r.split) for path, r in subset.items()
        }


@pytest.mark.parametrize(
    "path, generator, label",
    [
        ("ADM/imagenet_ai_0508_adm/train/ai/0_adm_174.PNG", "adm", 0),
        ("BigGAN/imagenet_ai_0419_biggan/train/ai/116_biggan_00098.png", "big_gan", 116),
        ("glide/imagenet_glide/train/ai/GLIDE_1000_200_07_808_glide_00033.png", "glide", 808),
        ("GLIDE/imagenet_glide/val/ai/808_glide_00033.png", "glide", 808),
        ("Midjourney/imagenet_midjourney/train/ai/0_midjourney_169.png", "midjourney", 0),
        (
            "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4/train/ai/033_sdv4_00137.png",
            "stable_diffusion_1_4",
            33,
        ),
        (
            "stable_diffusion_v_1_5/imagenet_ai_0424_sdv5/train/ai/005_sdv5_00008.png",
            "stable_diffusion_1_5",
            5,
        ),
        (
            "VQDM/imagenet_ai_0419_vqdm/train/ai/VQDM_1000_200_01_414_vqdm_00120.png",
            "vqdm",
            414,
        ),
        ("VQDM/imagenet_ai_0419_vqdm/val/ai/405_vqdm_00043.png", "vqdm", 405),
        ("wukong/imagenet_ai_0424_wukong/train/ai/277_wukong_image0.png", "wukong", 277),
        # without the inner level, extracted copies, the reference's short names, re-encoded copies
        ("wukong/train/ai/999_wukong_image61.png", "wukong", 999),
        ("BigGAN/imagenet_ai_0419_biggan_extracted/train/ai/001_biggan_00001.png", "big_gan", 1),
        ("ADM_extracted/imagenet_ai_0508_adm/train/ai/1_adm_1.PNG", "adm", 1),
        ("adm/train/ai/115_adm_154.JPEG", "adm", 115),
        ("big_gan/train/ai/116_biggan_00098.jpg", "big_gan", 116),
        ("stable_diffusion_1_4/train/ai/033_sdv4_00137.webp", "stable_diffusion_1_4", 33),
        ("sd15/train/ai/005_sdv5_00008.jpg", "stable_diffusion_1_5", 5),
        ("some/where/else/wukong/train/ai/5_wukong_image1.png", "wukong", 5),
        # the wnid is class 388, wherever it stands and however many others are there
        ("Midjourney/imagenet_midjourney/train/nature/n02510455_1.JPEG", "nature", 388),
        ("adm/val/nature/n15075141_77.jpg", "nature", 999),
    ],
)
def test_names_met_in_the_wild(tmp_path, path, generator, label):
    (record,) = listed("genimage", touch(tmp_path / "set", path)).values()
    assert (record.path, record.generator, record.object) == (path, generator, label)
    assert record.split == "test" if "/val/" in path else record.split in ("train", "val")


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("stable_diffusion_v_1_4/imagenet_ai_0419_sdv4/train/ai/033_sdv4_00134.png", True),
        ("115_adm_135.PNG", True),
        ("208_midjourney_76.png", True),
        ("glide/train/ai/GLIDE_1000_200_03_808_glide_00033.png", True),
        ("763_sdv5_00052.png", True),
        ("116_biggan_00107.png", True),
        ("116_biggan_00108.png", False),
        ("116_vqdm_00107.png", False),
        ("033_sdv5_00134.png", False),
        ("train/nature/n01440764_134.JPEG", False),
    ],
)
def test_the_releases_broken_files_are_known_by_name(path, known):
    assert is_known_broken(path) is known


def test_litter_and_hidden_files_are_passed_over(tmp_path):
    folder = "wukong/train/ai"
    touch(tmp_path, f"{folder}/1_wukong_image1.png", f"{folder}/.DS_Store", f"{folder}/Thumbs.db")
    touch(tmp_path, "README.txt", "metadata.csv", ".hidden/x.png", f"{folder}/._1_wukong_image1.png")
    assert list(listed("genimage", tmp_path)) == [f"{folder}/1_wukong_image1.png"]


def test_zips_inside_a_source_are_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)  # a command run in this process ends it
    touch(tmp_path, "wukong/train/ai/1_wukong_image1.png", "adm/adm.zip", "b.ZIP")
    listed("genimage", tmp_path)
    assert "2 zip files in it are not opened, first adm/adm.zip; unpack" in caplog.text


def test_a_folder_with_nothing_but_zips_says_so(tmp_path):
    touch(tmp_path, "adm.zip", "README.md")
    with pytest.raises(
        UserError, match=r"1 zip file\(s\), which are not opened, first adm\.zip: give it, or unpack"
    ):
        listed("genimage", tmp_path)


VAL = ("wukong/val/nature/ILSVRC2012_val_00000001.JPEG", "adm/val/nature/ILSVRC2012_val_00050000.JPEG")


def test_val_photographs_without_labels_are_unknown_and_it_is_said(tmp_path):
    layout = open_layout("genimage", touch(tmp_path / "set", *VAL))
    assert [(r.generator, r.object, r.split) for r in layout.records()] == [("nature", None, "test")] * 2
    assert len(layout.notes) == 1 and "LOC_val_solution.csv" in layout.notes[0]


@pytest.mark.parametrize("where", ["set", "."])
def test_kaggles_labels_are_found_beside_the_source(tmp_path, where):
    source = touch(tmp_path / "set", *VAL)
    (tmp_path / where / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00050000,n02510455 1 2 3 4 n02510455 5 6 7 8\n"
        "ILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
    )
    layout = open_layout("genimage", source)
    assert {r.path: r.object for r in layout.records()} == {VAL[0]: 0, VAL[1]: 388}
    assert layout.notes == []


def test_the_devkits_ground_truth_goes_through_its_mapping(tmp_path):
    labels = tmp_path / "devkit" / "ILSVRC2012_validation_ground_truth.txt"
    labels.parent.mkdir()
    labels.write_text("490\n" + "7\n" * 49_998 + "3\n")
    # The devkit also numbers synsets that are no classes (1001 and on).
    mapping = "3 n02510455\n7 n01443537\n490 n15075141\n1001 n00001740\n"
    labels.with_name("ILSVRC2012_mapping.txt").write_text(mapping)
    records = listed("genimage", touch(tmp_path / "set", *VAL), val_labels=labels)
    assert {path: r.object for path, r in records.items()} == {VAL[0]: 999, VAL[1]: 388}


def names(count: int, start: int = 0) -> list[str]:
    return [f"{n % 1000:03d}_biggan_{n:05d}.png" for n in range(start, start + count)]


def test_a_fiftieth_of_train_becomes_val_and_adding_or_recoding_moves_nothing(tmp_path):
    folder = "BigGAN/imagenet_ai_0419_biggan/train/ai"
    first = listed("genimage", touch(tmp_path / "a", *(f"{folder}/{n}" for n in names(2000))))
    share = Counter(r.split for r in first.values())["val"] / 2000
    assert abs(share - 0.02) < 0.01
    touch(tmp_path / "a", *(f"{folder}/{n}" for n in names(200, 2000)), "adm/train/ai/1_adm_1.PNG")
    second = listed("genimage", tmp_path / "a")
    assert len(second) == 2201 and first.items() <= second.items()
    recoded = (f"big_gan/train/ai/{n.replace('.png', '.JPEG')}" for n in names(2000))
    third = listed("genimage", touch(tmp_path / "b", *recoded))
    assert {Path(p).stem: r.split for p, r in third.items()} == {
        Path(p).stem: r.split for p, r in first.items()
    }
    more = listed("genimage", tmp_path / "b", val_fraction=0.3)
    assert abs(Counter(r.split for r in more.values())["val"] / 2000 - 0.3) < 0.04
    # A larger share takes in the smaller one.
    assert {p for p, r in third.items() if r.split == "val"} <= {
        p for p, r in more.items() if r.split == "val"
    }
    assert all(r.split == "train" for r in listed("genimage", tmp_path / "b", val_fraction=0.0).values())


def test_which_images_are_val_never_changes_between_versions(tmp_path):
    # A promise: a detector of today must not be validated tomorrow on what it was trained on.
    source = touch(tmp_path / "s", *(f"BigGAN/train/ai/{n}" for n in names(200)))
    found = [Path(p).stem for p, r in listed("genimage", source).items() if r.split == "val"]
    assert found == GOLDEN_VAL


# by hand: blake2b of the stem, 8 bytes, big-endian, below 0.02 * 2**64
GOLDEN_VAL = ["036_biggan_00036", "093_biggan_00093", "129_biggan_00129", "131_biggan_00131"]


# -- CIFAKE --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifake_mini(shared_data) -> tuple[Layout, list[Record]]:
    layout = open_layout("cifake", shared_data / "cifake-mini.zip")
    return layout, list(layout.records())


def test_cifakes_zip(shared_data, cifake_mini):
    layout, records = cifake_mini
    assert layout.objects == CLASSES and layout.object_in_json == "name"
    assert layout.generators == ("nature", "stable_diffusion_1_4")
    official = Counter((r.split == "test", r.generator) for r in records)
    assert official == {(False, g): 20_000 for g in layout.generators} | {
        (True, g): 5_000 for g in layout.generators
    }
    with open(shared_data / "cifake-mini-generators.csv", newline="") as file:
        truth = {row["path"]: row["object"] for row in csv.DictReader(file)}
    objects = {r.path: CLASSES[r.object] for r in records if r.object is not None}
    assert objects == truth
    val = {r.path for r in records if r.split == "val"}
    assert abs(len(val) / 40_000 - 0.10) < 0.01
    # REAL and FAKE share names; that must not tie their splits together.
    reals = {p.rpartition("/")[2] for p in val if "/REAL/" in p}
    fakes = {p.rpartition("/")[2] for p in val if "/FAKE/" in p}
    assert 0 < len(reals & fakes) < 0.3 * len(reals)


def test_cifakes_folder_gives_what_the_zip_gives(shared_data, cifake_mini, tmp_path):
    with zipfile.ZipFile(shared_data / "cifake-mini.zip") as archive:
        chosen = [n for n in archive.namelist() if n.endswith(".jpg")][::5000]
        archive.extractall(tmp_path / "folder", members=chosen)
        with zipfile.ZipFile(tmp_path / "nested.zip", "w") as nested:
            for name in chosen:
                nested.writestr(f"cifake/{name}", archive.read(name))
            nested.writestr("__MACOSX/cifake/._junk.jpg", b"x")
    whole = {record.path: record for record in cifake_mini[1]}
    assert listed("cifake", tmp_path / "folder") == {name: whole[name] for name in chosen}
    inside = listed("cifake", tmp_path / "nested.zip")
    for name in chosen:
        found = inside[f"cifake/{name}"]
        assert (found.generator, found.object, found.split) == (
            *(whole[name].generator, whole[name].object, whole[name].split),
        )
    assert open_layout("cifake", tmp_path / "nested.zip").read(f"cifake/{chosen[0]}") == (
        open_layout("cifake", tmp_path / "folder").read(chosen[0])
    )


def test_the_class_is_the_number_in_parentheses(tmp_path):
    suffixes = ["", *(f" ({k})" for k in range(2, 11))]
    source = touch(tmp_path / "s", *(f"train/FAKE/1000{s}.jpg" for s in suffixes), "test/REAL/0999 (4).jpg")
    records = listed("cifake", source)
    assert [records[f"train/FAKE/1000{s}.jpg"].object for s in suffixes] == list(range(10))
    assert records["test/REAL/0999 (4).jpg"] == Record("test/REAL/0999 (4).jpg", "nature", 3, "test")


def _read_all(layout, paths, answers):
    answers.put([layout.read(path) for path in paths])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_zip_is_read_by_several_processes_at_once(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(40):
            archive.writestr(f"test/REAL/{n:04d}.jpg", bytes([n]) * 100_000)
    layout = open_layout("cifake", tmp_path / "c.zip")
    paths = [record.path for record in layout.records()]
    right = [bytes([n]) * 100_000 for n in range(40)]
    assert layout.read(paths[7]) == right[7]  # the parent's archive is open before it forks
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    workers = [context.Process(target=_read_all, args=(layout, paths, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [layout.read(path) for path in paths] == right
    assert [answers.get(timeout=60) for _ in workers] == [right, right]
    for worker in workers:
        worker.join()
    assert len(pickle.dumps(layout.source)) < 1000


def test_a_damaged_member_of_a_zip_is_an_os_error_like_a_damaged_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test/REAL/0000.jpg", bytes(range(256)) * 100)
    data = bytearray((tmp_path / "c.zip").read_bytes())
    data[60:90] = b"\xff" * 30
    (tmp_path / "c.zip").write_bytes(data)
    with pytest.raises(OSError, match=r"0000\.jpg"):
        open_layout("cifake", tmp_path / "c.zip").read("test/REAL/0000.jpg")


def test_halving_the_test_leaves_train_whole(shared_data):
    source = shared_data / "cifake-mini.zip"
    plain, halved = (
        {r.path: r.split for r in open_layout("cifake", source, halve_test=halve).records()}
        for halve in (False, True)
    )
    for path, split in plain.items():
        assert (split == "test") == (halved[path] != "train")
    count = list(halved.values()).count
    assert abs(count("val") - count("test")) < 300 and count("val") + count("test") == 10_000
    with pytest.raises(UserError, match="val_fraction has no use"):
        open_layout("cifake", source, halve_test=True, val_fraction=0.1)
    with pytest.raises(UserError, match="halve_test: the manifest layout has no use for it"):
        open_layout("manifest", shared_data / "cifake-mini-generators.csv", halve_test=True)


def test_halving_works_on_genimages_layout_too(tmp_path):
    write_synthetic(tmp_path / "s", images=120, size=16)
    splits = [r.split for r in open_layout("synthetic", tmp_path / "s", halve_test=True).records()]
    whole = [r.split for r in open_layout("synthetic", tmp_path / "s", val_fraction=0.0).records()]
    assert splits.count("val") > 0 and splits.count("test") > 0
    assert splits.count("train") == whole.count("train")
