"""What users get wrong: one clear line each."""

import zipfile
from pathlib import Path

import pytest

from dataio.core.errors import UserError
from dataio.layouts import open_layout


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def message_of(name: str, source: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        list(open_layout(name, source, **options).records())
    assert "\n" not in str(error.value)
    return str(error.value)


CIFAKE = tuple(f"{a}/{b}/0000 (2).jpg" for a in ("train", "test") for b in ("REAL", "FAKE"))
GENIMAGE = (
    "ADM/imagenet_ai_0508_adm/train/ai/0_adm_1.PNG",
    "ADM/imagenet_ai_0508_adm/val/nature/n01440764_1.JPEG",
)


@pytest.mark.parametrize("name", ["genimage", "cifake", "synthetic"])
class TestSources:
    def test_missing(self, tmp_path, name):
        assert "nowhere: no such file or folder" in message_of(name, tmp_path / "nowhere")

    def test_empty(self, tmp_path, name):
        message = message_of(name, tmp_path)
        assert (
            f"no images of the {name} layout" in message and str(tmp_path) in message and "empty" in message
        )

    def test_only_litter(self, tmp_path, name):
        assert f"no images of the {name} layout" in message_of(name, touch(tmp_path, "a/README.txt"))

    def test_another_layout(self, tmp_path, name):
        other = GENIMAGE if name == "cifake" else CIFAKE
        for options in ({}, {"skip_unknown": True}):
            message = message_of(name, touch(tmp_path, *other), **options)
            assert f"no images of the {name} layout" in message and "check the layout" in message
            assert f"{len(other)} other files" in message and min(other) in message

    def test_neither_folder_nor_zip(self, tmp_path, name):
        (tmp_path / "x.zip").write_bytes(b"not a zip")
        assert "neither a folder nor a zip" in message_of(name, tmp_path / "x.zip")


def test_a_zip_cut_short(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for n in range(50):
            archive.writestr(f"test/REAL/{n:04d}.jpg", b"x" * 100)
    data = (tmp_path / "c.zip").read_bytes()
    (tmp_path / "c.zip").write_bytes(data[:-2000] + data[-22:])  # the directory lost, its end still there
    assert "c.zip" in message_of("cifake", tmp_path / "c.zip")


def test_unknown_layout(tmp_path):
    assert "layout imagenet: expected one of cifake, genimage, manifest, synthetic" in message_of(
        "imagenet", tmp_path
    )


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("cifake", "val_labels", "x.csv"),
        ("cifake", "subsets", ["adm"]),
        ("genimage", "root", "x"),
        ("cifake", "split_from_path", True),
    ],
)
def test_options_that_a_layout_does_not_have_are_not_ignored(tmp_path, name, option, value):
    message = message_of(name, tmp_path, **{option: value})
    assert f"{option}: the {name} layout has no use for it" in message


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_val_fraction(tmp_path, fraction):
    assert "val_fraction" in message_of("cifake", tmp_path, val_fraction=fraction)


MISFITS = [
    "ADM/train/ai/0_biggan_00001.png",  # another generator's name
    "ADM/train/ai/1000_adm_1.PNG",  # no such class
    "ADM/train/ai/0_adm_1",  # no suffix
    "ADM/train/ai/0_adm_1.gif",
    "ADM/train/ai/n01440764_1.JPEG",  # a photograph among the fakes
    "ADM/train/ai/adm_0_1.PNG",
    "ADM/train/nature/0_adm_1.PNG",  # a fake among the photographs
    "ADM/train/nature/n00000000_1.JPEG",  # no class's wnid
    "ADM/train/nature/ILSVRC2012_val_1.JPEG",
    "ADM/train/0_adm_2.PNG",
    "Flux/train/ai/0_adm_1.PNG",  # no generator of GenImage
    "ADM/test/ai/0_adm_1.PNG",
]


@pytest.mark.parametrize("path", MISFITS)
def test_each_name_that_fits_no_pattern_is_found(tmp_path, path):
    touch(tmp_path / "set", *GENIMAGE, path)
    message = message_of("genimage", tmp_path / "set")
    assert "1 file fits no pattern" in message and path in message and "skip_unknown" in message
    layout = open_layout("genimage", tmp_path / "set", skip_unknown=True)
    assert len(list(layout.records())) == 2
    assert [skipped for skipped, _ in layout.skipped] == [path]


def test_the_first_ten_misfits_are_named_and_all_are_counted_or_set_aside(tmp_path):
    paths = [f"ADM/train/ai/wrong_{n:02d}.png" for n in range(25)]
    touch(tmp_path / "set", *GENIMAGE, *paths)
    message = message_of("genimage", tmp_path / "set")
    assert "25 files fit no pattern" in message
    assert [path for path in paths if path in message] == paths[:10]
    layout = open_layout("genimage", tmp_path / "set", skip_unknown=True)
    for _ in range(2):
        assert len(list(layout.records())) == 2
        assert [path for path, _ in layout.skipped] == paths
    message = message_of(
        "cifake", touch(tmp_path / "c", *CIFAKE, "train/REAL/0000 (11).jpg", "train/REAL/x.jpg")
    )
    assert "2 files fit no pattern" in message and "0000 (11).jpg" in message


def test_subsets(tmp_path):
    touch(tmp_path, *GENIMAGE)
    assert "subsets: no generator 'flux'; expected some of adm, big_gan" in message_of(
        "genimage", tmp_path, subsets=["flux"]
    )
    assert "subsets wukong" in message_of("genimage", tmp_path, subsets=["wukong"])


class TestValLabels:
    """Ground truth that cannot be used is an error, never a set of unknown objects."""

    def message(self, tmp_path: Path, labels: Path) -> str:
        photograph = "ADM/val/nature/ILSVRC2012_val_00000002.JPEG"
        return message_of("genimage", touch(tmp_path / "set", photograph, *GENIMAGE), val_labels=labels)

    def test_missing(self, tmp_path):
        assert "val_labels" in self.message(tmp_path, tmp_path / "absent.csv")

    def test_neither_form(self, tmp_path):
        (tmp_path / "l.csv").write_text("a,b\n1,2\n")
        assert "neither Kaggle's" in self.message(tmp_path, tmp_path / "l.csv")

    def test_unknown_wnid(self, tmp_path):
        (tmp_path / "l.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000002,n00000000 1 2\n")
        assert "line 2 has 'n00000000'" in self.message(tmp_path, tmp_path / "l.csv")

    def test_two_classes_for_one_photograph(self, tmp_path):
        rows = "".join(f"ILSVRC2012_val_00000002,{wnid} 1 2\n" for wnid in ("n01440764", "n01443537"))
        (tmp_path / "l.csv").write_text("ImageId,PredictionString\n" + rows)
        assert "line 3 gives ILSVRC2012_val_00000002 another class" in self.message(
            tmp_path, tmp_path / "l.csv"
        )

    def test_photograph_not_listed(self, tmp_path):
        (tmp_path / "l.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2\n")
        assert "not listed in" in self.message(tmp_path, tmp_path / "l.csv")

    def test_devkit_without_mapping(self, tmp_path):
        (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 50_000)
        message = self.message(tmp_path, tmp_path / "ILSVRC2012_validation_ground_truth.txt")
        assert "ILSVRC2012_mapping.txt" in message and "beside it" in message

    def test_devkit_cut_short(self, tmp_path):
        (tmp_path / "g.txt").write_text("1\n" * 49_999)
        (tmp_path / "ILSVRC2012_mapping.txt").write_text("1 n01440764\n")
        message = self.message(tmp_path, tmp_path / "g.txt")
        assert "49999 lines" in message and "50000" in message

    @pytest.mark.parametrize("mapping", ["2 n01440764\n", "1 n00000000\n", "1\n", "x n01440764\n"])
    def test_devkit_with_a_mapping_that_lacks_an_id(self, tmp_path, mapping):
        (tmp_path / "g.txt").write_text("1\n" * 50_000)
        (tmp_path / "ILSVRC2012_mapping.txt").write_text(mapping)
        assert "ILSVRC2012_mapping.txt" in self.message(tmp_path, tmp_path / "g.txt")
