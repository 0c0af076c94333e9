"""Shards of kept files hold what training shows rightly, verify looks through its eyes, old folders go on."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from dataio.core.errors import UserError
from dataio.images import codec
from dataio.images.codec import CodecPolicy, preset_policy
from dataio.images.opening import open_image, to_rgb, upright
from dataio.images.training_decoder import training_pixels
from dataio.layouts.manifest import ManifestLayout
from dataio.sharding.job import ShardJob, run_job
from dataio.sharding.plan import PLAN_HEAD, make_plan
from dataio.sharding.verify import require_intact, verify_shards
from dataio.shards.shard_set import ShardSet


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 40, 3)).astype(np.uint8))


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cut_out(seed):
    image = picture(seed).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 40))
    return image


def sources():
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "0.jpg": saved(picture(0), "JPEG"),
        "1.jpg": saved(picture(1), "JPEG", exif=exif),
        "2.png": saved(picture(2), "PNG"),
        "3.png": saved(cut_out(3), "PNG"),
        "4.gif": saved(picture(4), "GIF"),
        "5.tif": saved(picture(5), "TIFF", exif=exif),
        "6.png": b"no image",
        "7.tif": saved(picture(7), "TIFF", compression="lzma"),
    }


def job_of(folder, policy):
    folder.mkdir(exist_ok=True)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "generator", "object", "split"])
        for number, (name, data) in enumerate(sources().items()):
            (folder / name).write_bytes(data)
            writer.writerow([name, ("nature", "glide")[number % 2], "", "train"])
    layout = ManifestLayout(folder / "list.csv", root=folder)
    return ShardJob(layout, folder / "out", policy, quiet=True)


def test_kept_shards_hold_what_training_shows_upright_and_on_white(tmp_path):
    manifest = run_job(job_of(tmp_path, preset_policy("keep")))
    shards, files = ShardSet(tmp_path / "out", "train"), sources()
    assert len(shards) == 7 and [entry["path"] for entry in manifest["rejected"]] == ["6.png"]
    kept = set()
    for row in range(len(shards)):
        name, stored = shards.about(row)["source"], shards.read(row).tobytes()
        expected = np.asarray(to_rgb(upright(open_image(files[name]))))
        assert np.abs(training_pixels(stored).astype(int) - expected).mean() <= 2
        assert expected.shape[1::-1] == (shards.rows[row]["width"], shards.rows[row]["height"])
        kept |= {name} if stored == files[name] else set()
    assert kept == {"0.jpg", "2.png"}
    reasons = {entry["path"]: entry["reason"] for entry in manifest["warnings"]}
    assert reasons.keys() == {"1.jpg", "3.png", "4.gif", "5.tif", "7.tif"}
    assert "orientation 6" in reasons["1.jpg"] and "transparency" in reasons["3.png"]
    assert verify_shards(tmp_path / "out") == (7, [])


def test_verify_finds_what_an_earlier_version_kept_though_training_shows_it_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "training_fault", lambda *about: "")  # earlier versions did not look
    policy = CodecPolicy(preset="keep", resize="keep")
    run_job(job_of(tmp_path, policy))
    checked, faults = verify_shards(tmp_path / "out")
    assert checked == 7 and len(faults) == 3  # with "drop" the transparent one is what training saw
    assert sum("does not turn it upright (orientation 6)" in fault for fault in faults) == 2
    assert sum("the training decoder cannot read it" in fault for fault in faults) == 1
    with pytest.raises(UserError, match="shard it again"):
        require_intact(tmp_path / "out")


@pytest.mark.parametrize("preset", ["default", "keep"])
def test_a_folder_begun_by_an_earlier_version_goes_on_with_its_own_policy(tmp_path, preset):
    job = job_of(tmp_path, preset_policy(preset))
    old = preset_policy(preset).to_dict()
    del old["transparency"]
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    settings = {**job.settings, "source": job.layout.root, "codec": {**old, "history": None}}
    make_plan(job.layout, work, CodecPolicy.from_dict(old), settings)
    head = json.loads((work / PLAN_HEAD).read_text())
    for key in ("policy", "notes"):
        head[key].pop("transparency") if key == "policy" else head.pop(key)
    (work / PLAN_HEAD).write_text(json.dumps(head))
    manifest = run_job(job)
    assert manifest["codec"]["transparency"] == "drop"
    # Finished, too: its own manifest is what a rerun gives.
    assert run_job(job) == manifest
    other = ShardJob(job.layout, job.output, preset_policy("native-crop"), quiet=True)
    with pytest.raises(UserError, match="was begun with codec"):
        run_job(other)
