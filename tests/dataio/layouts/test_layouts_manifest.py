"""The manifest layout: any data set, listed in a CSV."""

import csv
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from dataio.core.errors import UserError
from dataio.layouts import open_layout
from dataio.layouts.base import Record


def write(folder: Path, text: str, images: int = 0, encoding: str = "utf-8") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(images):
        (folder / f"{n}.jpg").write_bytes(b"x")
    path = folder / "m.csv"
    path.write_bytes(text.encode(encoding))
    return path


def rows(count: int, tail: str = "") -> str:
    return (
        "path,generator,object"
        + (",group" if tail else "")
        + "\n"
        + "".join(f"{n}.jpg,{'nature' if n % 2 else 'gan'},cat{tail.format(n // 4)}\n" for n in range(count))
    )


def test_cifakes_generators_through_a_manifest(shared_data):
    source = shared_data / "cifake-mini-generators.csv"
    layout = open_layout("manifest", source, root=shared_data / "cifake-mini.zip", split_from_path=True)
    records = list(layout.records())
    with open(source, newline="") as file:
        truth = {row["path"]: (row["generator"], row["object"]) for row in csv.DictReader(file)}
    assert layout.generators == ("nature", "ae_bilinear", "ae_convt", "ae_nearest", "ae_shuffle")
    assert layout.object_in_json == "name" and len(layout.objects) == 10
    found = {r.path: (r.generator, layout.objects[r.object]) for r in records if r.object is not None}
    assert found == truth
    assert all((r.split == "test") == r.path.startswith("test/") for r in records)
    assert abs(Counter(r.split for r in records)["val"] / 40_000 - 0.10) < 0.01
    with zipfile.ZipFile(shared_data / "cifake-mini.zip") as archive:
        assert layout.read(records[0].path) == archive.read(records[0].path)


def test_no_group_is_in_two_splits(shared_data):
    layout = open_layout("manifest", shared_data / "natural256" / "labels.csv")
    records = list(layout.records())
    assert len(records) == 1710 and layout.generators[0] == "nature" and len(layout.generators) == 10
    splits = {(r.group, r.split) for r in records}
    assert len(splits) == len({r.group for r in records}) < 1710
    share = {split: n / 1710 for split, n in Counter(r.split for r in records).items()}
    assert share["train"] > 0.7 and share["val"] > 0.04 and share["test"] > 0.04


@pytest.mark.parametrize("encoding, newline", [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_byte_order_marks_and_windows_lines(tmp_path, encoding, newline):
    text = 'path,generator,object,split,group\n0.jpg,nature,"cat, fat",train,\n1.jpg,gan,,test,g\n2.jpg,big,ant,val,\n'
    layout = open_layout("manifest", write(tmp_path, text.replace("\n", newline), 3, encoding))
    assert layout.generators == ("nature", "big", "gan") and layout.objects == ("ant", "cat, fat")
    assert list(layout.records()) == [
        Record("0.jpg", "nature", 1, "train"),
        Record("1.jpg", "gan", None, "test", group="g"),
        Record("2.jpg", "big", 0, "val"),
    ]


def test_adding_rows_moves_no_other(tmp_path):
    first = list(open_layout("manifest", write(tmp_path, rows(600), 900)).records())
    share = Counter(r.split for r in first)
    assert abs(share["val"] / 600 - 0.1) < 0.04 and abs(share["test"] / 600 - 0.1) < 0.04
    second = list(open_layout("manifest", write(tmp_path, rows(900))).records())
    assert second[:600] == first
    grouped = open_layout("manifest", write(tmp_path, rows(900, ",{}"))).records()
    assert len({(r.group, r.split) for r in grouped}) == 225
    none = open_layout("manifest", write(tmp_path, rows(900)), val_fraction=0.0).records()
    assert Counter(r.split for r in none)["val"] == 0


def test_split_from_path(tmp_path):
    paths = [f"{s}/{n}.jpg" for s in ("train", "test", "val") for n in range(100)]
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    source = write(tmp_path, "path,generator,object\n" + "".join(f"{p},nature,\n" for p in paths))
    counts = Counter(
        (r.path.split("/")[0], r.split)
        for r in open_layout("manifest", source, split_from_path=True).records()
    )
    assert counts["test", "test"] == counts["val", "val"] == 100
    # Unless it is asked for, a path's folders say nothing about splits.
    plain = Counter((r.path.split("/")[0], r.split) for r in open_layout("manifest", source).records())
    assert plain["test", "train"] > 50 and plain["train", "test"] > 1
    assert counts["train", "train"] + counts["train", "val"] == 100 and 2 <= counts["train", "val"] <= 25


def test_hidden_folders_and_untidy_paths_are_taken_as_written(tmp_path):
    for path in (".cache/0.jpg", "a/1.jpg"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"x")
    source = write(tmp_path, "path,generator,object\n.cache/0.jpg,nature,\n./a//1.jpg,nature,\n")
    assert [r.path for r in open_layout("manifest", source).records()] == [".cache/0.jpg", "a/1.jpg"]


HEAD = "path,generator,object\n"
BAD = {
    "no generator column": (
        "path,label,object\n0.jpg,nature,\n",
        r"no column 'generator'.*found path, label, object",
    ),
    "no rows": (HEAD, "has no rows"),
    "nothing at all": ("", "no column 'path'.*found nothing"),
    "repeated": (HEAD + "0.jpg,nature,\n1.jpg,nature,\n0.jpg,gan,\n", r"line 4: path '0.jpg' .*line 2"),
    "repeated otherwise written": (HEAD + "0.jpg,nature,\n./0.jpg,gan,\n", r"line 3: path '0.jpg' .*line 2"),
    "absolute": (HEAD + "0.jpg,nature,\n/etc/1.jpg,nature,\n", r"line 3: path is '/etc/1.jpg'"),
    "upwards": (HEAD + "a/../../1.jpg,nature,\n", r"line 2: path is .*'\.\.'"),
    "empty path": (HEAD + ",nature,\n", r"line 2: path is ''"),
    "empty generator": (HEAD + "0.jpg,,cat\n", r"line 2: generator is empty"),
    "bad split": (
        "path,generator,object,split\n0.jpg,nature,,dev\n",
        r"line 2: split is 'dev'.*train, val or test",
    ),
    "missing": (
        HEAD + "0.jpg,nature,\n9.jpg,nature,\n",
        r"1 of its files are not under .*9\.jpg \(line 3\).*skip_unknown",
    ),
    "a line after a blank one": (HEAD + "\n0.jpg,nature,\n\n9.jpg,,\n", r"line 5: generator is empty"),
    "a group in two splits": (
        "path,generator,object,split,group\n0.jpg,nature,,train,g\n1.jpg,nature,,test,g\n",
        r"line 3: group 'g' is in test and in train",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests_are_one_line_that_names_file_and_line(tmp_path, case):
    text, message = BAD[case]
    source = write(tmp_path, text, 2)
    with pytest.raises(UserError, match=message) as error:
        list(open_layout("manifest", source).records())
    assert "\n" not in str(error.value) and str(source) in str(error.value)


def test_missing_files_are_counted_ten_are_named_or_they_are_set_aside(tmp_path):
    source = write(tmp_path, rows(30), 5)
    with pytest.raises(UserError, match="25 of its files are not under") as error:
        list(open_layout("manifest", source).records())
    assert str(error.value).count("(line ") == 10
    layout = open_layout("manifest", source, skip_unknown=True)
    assert len(list(layout.records())) == 5 and len(layout.skipped) == 25
    list(layout.records())
    assert len(layout.skipped) == 25


def test_a_path_to_split_by_must_begin_with_a_split(tmp_path):
    with pytest.raises(UserError, match=r"split_from_path.*'0\.jpg'"):
        list(open_layout("manifest", write(tmp_path, rows(1), 1), split_from_path=True).records())


def test_what_is_no_csv_and_a_root_that_is_not_there(tmp_path):
    source = write(tmp_path, rows(1), 1)
    with pytest.raises(UserError, match=r"root .*nowhere"):
        open_layout("manifest", source, root=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"folder.*expected a CSV"):
        open_layout("manifest", tmp_path)
    with pytest.raises(UserError, match="no such CSV"):
        open_layout("manifest", tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="is UTF-16, expected UTF-8"):
        open_layout("manifest", tmp_path / "binary.csv")


def test_too_large_a_val_fraction_leaves_no_train(tmp_path):
    with pytest.raises(UserError, match=r"val_fraction 0\.95.*for test"):
        open_layout("manifest", write(tmp_path, rows(1), 1), val_fraction=0.95)


def labels_of(folder, text, images=4, **options):
    layout = open_layout("manifest", write(folder, text, images), **options)
    records = list(layout.records())
    objects = [None if r.object is None else layout.objects[r.object] for r in records]
    return [r.generator for r in records], objects, layout


def test_spellings_of_the_real_class_are_photographs_and_said(tmp_path):
    text = HEAD + '0.jpg, "nature",\n1.jpg,Nature,\n2.jpg,real,\n3.jpg,glide,\n'
    generators, _, layout = labels_of(tmp_path, text)
    assert generators == ["nature", "nature", "nature", "glide"] and layout.generators == ("nature", "glide")
    (note,) = layout.notes
    assert "'Nature' (1 row), 'real' (1 row): read as photographs, named nature" in note


@pytest.mark.parametrize("pair", ["0,1", "1.0,0.0", "true,false", "Yes,No", "nan,sd"])
def test_labels_of_which_nothing_says_which_is_real_are_the_users_decision(tmp_path, pair):
    real, fake = pair.split(",")
    text = HEAD + f"0.jpg,{fake},\n1.jpg,{real},\n"
    with pytest.raises(UserError, match=r"m\.csv: generator .* does not say .*real \(--real NAME\)"):
        labels_of(tmp_path, text)
    generators, _, layout = labels_of(tmp_path, text, real=real)
    assert generators == [fake, "nature"] and layout.generators == ("nature", fake)
    with pytest.raises(UserError, match="real ,: holds an empty name"):
        labels_of(tmp_path, text, real=",")


def test_the_real_option_belongs_to_the_manifest_layout(tmp_path):
    with pytest.raises(UserError, match="real: the cifake layout has no use for it"):
        open_layout("cifake", tmp_path, real="0")


def test_forms_of_one_label_are_one_and_look_alikes_are_named(tmp_path):
    text = HEAD + "0.jpg,nature,caf\u00e9\n1.jpg,glide,cafe\u0301\n2.jpg,glide,Cat\n3.jpg,glide,cat\u200b\n"
    _, objects, layout = labels_of(tmp_path, text)
    assert objects == ["caf\u00e9", "caf\u00e9", "Cat", "cat"] and layout.objects == (
        "Cat",
        "caf\u00e9",
        "cat",
    )
    assert len(layout.notes) == 2 and "'Cat' and 'cat'" in layout.notes[1]
    with pytest.raises(UserError, match=r"'ADM' \(line 3\) and 'adm' \(line 4\) look alike"):
        labels_of(tmp_path, HEAD + "0.jpg,nature,\n1.jpg,ADM,\n2.jpg,adm,\n")


def test_forms_of_one_group_are_one(tmp_path):
    head = "path,generator,object,split,group\n"
    with pytest.raises(UserError, match="line 3: group 'caf\u00e9' is in test and in train"):
        labels_of(tmp_path, head + "0.jpg,nature,,train,caf\u00e9\n1.jpg,nature,,test,cafe\u0301\u200b\n")


def test_a_path_that_names_no_file_gets_a_hint(tmp_path):
    with pytest.raises(
        UserError, match=r"1 of its files are not under .*'0.JPG' is '0.jpg' there: upper and lower"
    ):
        labels_of(tmp_path, HEAD + "0.JPG,nature,\n")
    with pytest.raises(UserError, match=r"line 2: path is .*below the root.*is '0.jpg' there"):
        labels_of(tmp_path, HEAD + f"{tmp_path}/0.jpg,nature,\n")


def test_names_that_are_bytes_can_be_listed_and_labels_cannot(tmp_path):
    (tmp_path / "caf\udce9.jpg").write_bytes(b"x")
    (tmp_path / "m.csv").write_bytes(HEAD.encode() + b"caf\xe9.jpg,nature,\n")
    (record,) = open_layout("manifest", tmp_path / "m.csv").records()
    assert record.path == "caf\udce9.jpg"
    for line in (b"0.jpg,caf\xe9,\n", b"0.jpg,nature,caf\xe9\n", "0.jpg,nature,caf\ufffd\n".encode()):
        (tmp_path / "m.csv").write_bytes(HEAD.encode() + line)
        with pytest.raises(UserError, match=r"line 2: .* is not UTF-8; save the file as UTF-8"):
            open_layout("manifest", tmp_path / "m.csv")
