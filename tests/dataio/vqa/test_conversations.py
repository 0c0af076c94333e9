"""Conversations in LLaVA's format: what is read, what is rejected, and by which words."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.vqa.conversations import check_images, load_rgb, read_conversations, tar_members
from dataio.vqa.sample_text import escaped, text_fault

MARKERS = (" ASSISTANT: ", "<|endoftext|>", "<image>")


def said(*texts):
    roles = ("human", "gpt")
    return [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]


def sample(name="a", *texts, **changes):
    texts = texts or ("<image>\nReal?", "Fake.")
    return {"id": name, "image": "x.jpg", "conversations": said(*texts), **changes}


def written(folder, records, name="set.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(records))
    return folder / name


def picture(folder, name="x.jpg"):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    image.save(folder / name)
    return folder / name


def test_good_samples_of_every_form_are_read(tmp_path):
    place = picture(tmp_path)
    records = [
        sample("relative"),
        sample("absolute", image=str(place)),
        sample("turns", "<image>\nReal?", "Fake.", "Why?", "It glows."),
        {"id": "text", "conversations": said("What is a camera?", "A box.")},
        sample(
            "roles",
            conversations=[{"from": "user", "value": "<image> Real?"}, {"from": "assistant", "value": "No"}],
        ),
        sample("meta", metadata={"generator": "adm"}),
    ]
    found, rejected = read_conversations(written(tmp_path, records), markers=MARKERS)
    assert not rejected
    assert [one.id for one in found] == ["relative", "absolute", "turns", "text", "roles", "meta"]
    assert {one.image for one in found} == {str(place), None}
    assert found[2].turns == (("<image>\nReal?", "Fake."), ("Why?", "It glows."))
    assert found[5].metadata == {"generator": "adm"}
    assert check_images(found) == (found, [])


BAD = {
    "no list": (sample(conversations="hello"), "no list of conversations"),
    "gpt first": (sample(conversations=said("a", "b")[::-1]), "message 0 is from 'gpt', expected 'human'"),
    "open end": (sample("a", "<image>\nReal?", "Fake.", "Why?"), "ends with a question"),
    "no text": (
        sample(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]),
        "message 0 has no text",
    ),
    "empty answer": (sample("a", "<image>\nReal?", " \n"), "empty answer"),
    "empty question": (sample("a", "<image>\n", "Fake."), "empty question"),
    "no mark": (sample("a", "Real?", "Fake."), "has an image but no <image>"),
    "no image": (
        {"id": "a", "conversations": said("<image>\nReal?", "Fake.")},
        "has <image> in its text but no image",
    ),
    "two images": (sample("a", "<image>\nReal?", "Fake.", "<image> again?", "Yes"), "<image> 2 times"),
    "two images in one question": (sample("a", "<image>\n<image>\nReal?", "Fake."), "<image> 2 times"),
    "image in an answer": (sample("a", "<image>\nReal?", "See <image>."), "marker '<image>'"),
    "lone surrogate": (
        sample("a", "<image>\nReal?", "Fake \ud83d"),
        "message 1 holds a lone surrogate, \\ud83d",
    ),
    "halves in the wrong order": (
        sample("a", "<image> \ude00\ud83d?", "Fake"),
        "message 0 holds a lone surrogate",
    ),
    "zero byte": (sample("a", "<image>\nRe\0al?", "Fake."), "message 0 holds a control character, \\x00"),
    "escape": (sample("a", "<image>\nReal?", "\x1b[31mFake"), "message 1 holds a control character, \\x1b"),
    "a number": (sample("a", "<image>\nReal?", 3), "message 1 is a int, expected text"),
    "a list": (sample("a", ["<image>\nReal?"], "Fake"), "message 0 is a list, expected text"),
    "nothing visible": (sample("a", "<image>\nReal?", "\u200b\ufeff \u00a0"), "empty answer"),
    "no question": (sample("a", "<image>\u200b", "Fake"), "empty question"),
    "surrogate in the image": (sample(image="\ud83d.jpg"), "its image is '\\ud83d.jpg', which no file"),
    "zero byte in the image": (sample(image="a\0.jpg"), "which no file can be named"),
    "image of a number": (sample(image=3), "its image is 3"),
    "end token": (sample("a", "<image>\nReal?", "Fake.<|endoftext|>USER: me"), "marker '<|endoftext|>'"),
    "role in answer": (sample("a", "<image>\nReal?", "It ASSISTANT: is"), "marker ' ASSISTANT: '"),
    "end in question": (sample("a", "<image>\nReal<|endoftext|>?", "Fake."), "marker '<|endoftext|>'"),
    "not an object": ("hello", "is a str, expected an object"),
}


@pytest.mark.parametrize(("record", "reason"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_rejected_by_name(tmp_path, record, reason):
    found, rejected = read_conversations(written(tmp_path, [sample("good"), record]), markers=MARKERS)
    assert [one.id for one in found] == ["good"]
    assert [one.id for one in rejected] == ["a" if isinstance(record, dict) else "sample 1"]
    assert reason in rejected[0].reason


def test_ids_that_repeat_are_numbered_in_the_files_order(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO")
    texts = ["<image>\nReal?", "<image>\nWhat?", "<image>\nWhere?", "<image>\nWho?", "<image>\nReal?"]
    records = [
        sample(name, text, "Yes") for name, text in zip(["a", "a", "b", "a#2", "a"], texts, strict=True)
    ]
    records[1]["conversations"][1]["value"] = (
        ""  # also a rejected one counts, or correcting it would rename others
    )
    found, rejected = read_conversations(written(tmp_path, records), markers=MARKERS)
    assert [one.id for one in found] == ["a", "b", "a#2#2", "a#3"]
    assert [one.id for one in rejected] == ["a#2"]
    assert "3 samples have the id of an earlier one and are named a#2 and so on" in caplog.text
    assert "samples that repeat an earlier one word for word: 1, first a#3" in caplog.text
    records[1]["conversations"][1]["value"] = "Yes"
    again, _ = read_conversations(written(tmp_path, records), markers=MARKERS)
    assert [one.id for one in again] == ["a", "a#2", "b", "a#2#2", "a#3"]


@pytest.mark.parametrize("given", [None, "", [1], {"a": 1}])
def test_samples_without_an_id_are_named_by_their_place(tmp_path, given):
    found, _ = read_conversations(written(tmp_path, [sample(given), sample("\ud83d\n")]), markers=MARKERS)
    assert [one.id for one in found] == ["sample 0", "\\ud83d\\n"]


def test_a_set_without_a_good_sample(tmp_path):
    with pytest.raises(UserError, match=r"set\.json: no usable conversation among 1: a: has an empty answer"):
        read_conversations(written(tmp_path, [sample("a", "<image>\nR?", "")]), markers=MARKERS)


@given(st.text(st.characters(), min_size=1))
def test_text_without_a_fault_can_be_encoded_and_tokenized(text):
    if not text_fault(text):
        assert text.encode().decode() == text
    escaped(text).encode("ascii" if escaped(text).isascii() else "utf-8")


def test_missing_and_corrupt_images_are_named(tmp_path):
    whole = picture(tmp_path).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    records = [sample("good"), sample("gone", image="gone.jpg"), sample("cut", image="cut.jpg")]
    found, _ = read_conversations(written(tmp_path, records), markers=MARKERS)
    good, rejected = check_images(found)
    assert [one.id for one in good] == ["good"]
    assert [(one.id, "gone.jpg: cannot be read" in one.reason) for one in rejected] == [
        ("gone", True),
        ("cut", False),
    ]
    assert "cut.jpg: not a readable image" in rejected[1].reason


def test_absolute_paths_of_another_machine_are_found_in_the_images_folder(tmp_path):
    place = picture(tmp_path)
    file = written(tmp_path / "sets", [sample(image="/home/someone/else/x.jpg")])
    found, _ = read_conversations(file, tmp_path, MARKERS)
    assert found[0].image == str(place)


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_webdataset_tars_and_members_of_tars(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    place = picture(tmp_path)
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:06d}.tar", "w") as archive:
            add(archive, "000000001.jpg", place.read_bytes())
            record = {"conversations": said("<image>\nReal?", f"Fake {number}.")}
            add(archive, "000000001.json", json.dumps(record).encode())
            add(archive, "000000002.jpg", place.read_bytes())
            for suffix in ("json", "jpg", "png"):
                add(archive, f"000000003.{suffix}", json.dumps(record).encode())
    (tmp_path / "old.tar.gz").touch()
    found, rejected = read_conversations(tmp_path, markers=MARKERS)
    assert [one.id for one in rejected] == ["000000/000000003", "000001/000000003"]
    assert "000000003.png'], expected a path" in rejected[0].reason
    assert [one.id for one in found] == ["000000/000000001", "000001/000000001"]
    assert (
        f"{tmp_path}: not read: 3, first old.tar.gz; expected uncompressed tars with an image" in caplog.text
    )
    assert check_images(found)[1] == []
    expected = np.asarray(Image.open(place).convert("RGB"))
    assert (np.asarray(load_rgb(str(found[1].image))) == expected).all()
    file = written(tmp_path / "sets", [sample(image="../000001.tar/000000001.jpg")])
    (member,), _ = read_conversations(file, markers=MARKERS)
    assert (np.asarray(load_rgb(str(member.image))) == expected).all()
    with pytest.raises(UserError, match="no such member"):
        load_rgb(f"{tmp_path}/000001.tar/2.jpg")
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"bad\.tar: not a readable tar"):
        tar_members(str(tmp_path / "bad.tar"))


def test_files_that_are_no_sets(tmp_path):
    with pytest.raises(UserError, match="not found or empty"):
        read_conversations(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="not readable as JSON"):
        (tmp_path / "cut.json").write_text("[{")
        read_conversations(tmp_path / "cut.json")
    with pytest.raises(UserError, match="holds a dict, expected a list"):
        read_conversations(written(tmp_path, {"a": 1}))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "bom.json").write_text(json.dumps([sample()]), encoding="utf-8-sig")
    assert len(read_conversations(tmp_path / "bom.json", markers=MARKERS)[0]) == 1


def test_the_reference_set_is_read_whole(shared_data):
    found, rejected = read_conversations(shared_data / "vqa" / "finetune", markers=MARKERS)
    assert (len(found), rejected) == (99, [])
    assert check_images(found)[1] == []
