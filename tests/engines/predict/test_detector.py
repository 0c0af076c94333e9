"""Images in batches: order, what DALI cannot decode, endless inputs, and networks that diverged."""

import io
from functools import partial
from itertools import count, islice

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.core.errors import UserError
from dataio.images.codec import Encoded, encode, preset_policy
from dataio.images.opening import Undecodable
from dataio.sources.inputs import Input
from engines.checkpoint import files as checkpoints
from engines.predict.detector import Detector, predict_file
from engines.predict.explain import as_html, as_text, explain_images
from engines.predict.predict import PredictionRow, predict, predict_prepared, print_rows, write_rows
from tests.dataio.images.pictures import exif, oriented, picture, saved, with_exif
from tests.support import write_detector


def _source(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector(write_detector(tmp_path_factory.mktemp("single") / "best.pt"), batch=4)


def test_an_image_that_only_dali_refuses_spoils_no_other(detector):
    good = [detector.prepare(_source(seed)) for seed in range(3)]
    expected = [prediction.p_fake for prediction in detector.predict(good)]
    assert len(set(expected)) == 3
    bad = Encoded(b"\xff\xd8 looks like a JPEG", "jpg", 32, 32, "")
    found = detector.predict([good[0], bad, good[1], good[2]])
    assert isinstance(found[1], Undecodable)
    np.testing.assert_allclose([found[n].p_fake for n in (0, 2, 3)], expected, atol=1e-5)
    # The pipeline lives again.
    np.testing.assert_allclose(
        [prediction.p_fake for prediction in detector.predict(good)], expected, atol=1e-5
    )
    assert detector.predict([]) == []


def test_the_picture_is_evaluations_crop(detector, tmp_path):
    (tmp_path / "a.png").write_bytes(_source(0))
    prediction, warning = predict_file(detector, tmp_path / "a.png")
    assert warning == ""
    shown = detector.input_picture(prediction)
    encoded = encode(_source(0), preset_policy("default", 32))
    crop = (
        Image.open(io.BytesIO(encoded.data)).crop((2, 2, 30, 30)).resize((32, 32), Image.Resampling.BILINEAR)
    )
    assert shown.shape == (32, 32, 3) and shown.dtype == np.uint8
    assert np.abs(shown.astype(int) - np.asarray(crop)).mean() < 3


def test_inputs_are_taken_as_they_are_needed(detector):
    taken = 0

    def endless():
        nonlocal taken
        for number in count():
            taken += 1
            yield Input(f"{number}.png", partial(_source, number % 5))

    rows = list(islice(predict(detector, endless(), workers=2), 50))
    assert [row.path for row in rows] == [f"{number}.png" for number in range(50)]
    assert all(row.verdict for row in rows) and taken <= 50 + 4 * detector.batch


def test_rows_are_the_same_where_answers_are_fetched_a_batch_later(detector):
    # What a GPU does; batches of 4, the last one short, unreadable inputs and an image that only DALI refuses.
    encoded = [detector.prepare(_source(seed)) for seed in range(6)]
    encoded.insert(2, Encoded(b"\xff\xd8 looks like a JPEG", "jpg", 32, 32, ""))
    given = [*encoded[:5], None, *encoded[5:], None, None]

    def rows(late):
        prepared = ((PredictionRow(str(number)), image) for number, image in enumerate(given))
        return list(predict_prepared(detector, prepared, None, late=late))

    found = rows(late=True)
    assert found == rows(late=False)
    assert [row.path for row in found] == [str(number) for number in range(len(given))]
    assert [row.verdict is None for row in found] == [number in (2, 5, 8, 9) for number in range(len(given))]


def test_errors_nobody_foresaw_stay_in_their_row(detector):
    def broken():
        raise ZeroDivisionError("in a\ndecoder")

    rows = list(predict(detector, [Input("a", broken), Input("b", lambda: _source(1))], workers=2))
    assert rows[0] == PredictionRow("a", error="cannot be processed (ZeroDivisionError: in a decoder)")
    assert rows[1].error is None and rows[1].verdict


def test_credentials_are_shown_and_do_not_touch_the_score(detector):
    image = Image.open(io.BytesIO(_source(3)))
    sources = []
    for xmp in (None, b'<x Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/x/trainedAlgorithmicMedia"/>'):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, **({"xmp": xmp} if xmp else {}))
        sources.append(buffer.getvalue())
    plain, marked = predict(
        detector, [Input(str(n), partial(bytes, s)) for n, s in enumerate(sources)], workers=1
    )
    assert (plain.credentials, marked.credentials) == (None, "IPTC: trainedAlgorithmicMedia")
    assert plain.p_fake == pytest.approx(marked.p_fake, abs=1e-6) and plain.verdict == marked.verdict


def test_a_diverged_checkpoint_is_one_line_and_leaves_no_file(tmp_path):
    state = checkpoints.load(write_detector(tmp_path / "best.pt"))
    state["model"]["generator_head.bias"][:] = torch.nan
    checkpoints.save(tmp_path / "nan.pt", state)
    rows = predict(Detector(tmp_path / "nan.pt"), [Input("a", lambda: _source(1))], workers=1)
    with pytest.raises(UserError, match="did the training diverge"):
        write_rows(str(tmp_path / "out.csv"), rows, maps=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "nan.pt"]


def test_no_maps_from_a_network_without_convolutions(tmp_path):
    checkpoint = write_detector(tmp_path / "best.pt", backbone="swin_t", size=64)
    rows = predict(Detector(checkpoint), [], workers=1, explain=str(tmp_path / "maps"))
    with pytest.raises(UserError, match=r"explain .*leave it out"):
        print_rows(rows)
    assert not (tmp_path / "maps").exists()


def test_damage_is_an_error_and_oddities_are_a_warning(detector, tmp_path, capsys):
    jpeg = saved(picture(160, 120), "JPEG")
    files = {
        "whole.jpg": jpeg,
        "padded.jpg": jpeg[:-2] + bytes(16) + jpeg[-2:],
        "half.jpg": jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9",
        "turned.jpg": with_exif("JPEG", exif(oriented(6), (0x011A, 10, 1, bytes(4)))),
    }
    rows = list(
        predict(detector, [Input(name, partial(bytes, data)) for name, data in files.items()], workers=2)
    )
    whole, padded, half, turned = rows
    assert (whole.warning, turned.error) == (None, None)
    assert padded.p_fake == pytest.approx(whole.p_fake, abs=1e-5) and "extraneous bytes" in (
        padded.warning or ""
    )
    assert half.verdict is half.warning is None and "damaged or cut short" in (half.error or "")
    print_rows(rows)
    assert "warning: Corrupt JPEG data: " in capsys.readouterr().out
    write_rows(str(tmp_path / "rows.csv"), iter(rows), maps=False)
    assert (tmp_path / "rows.csv").read_text().splitlines()[0].endswith(",credentials,warning")


def test_the_limit_of_pixels_can_be_raised(detector, tmp_path):
    source = saved(Image.new("L", (1200, 900)))
    assert detector.prepare(source).width == 32
    limited = Detector(write_detector(tmp_path / "best.pt"), 1, max_megapixels=1)
    (row,) = predict(limited, [Input("a", partial(bytes, source))], workers=1)
    assert "1.1 megapixels, more than the limit of 1" in str(row.error) and "--max-megapixels" in str(
        row.error
    )


def test_explain_reports_what_cannot_be_read_and_goes_on(tmp_path):
    jpeg = saved(picture(160, 120), "JPEG")
    for name, data in (
        ("half", jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9"),
        ("odd", jpeg[:-2] + bytes(16) + jpeg[-2:]),
    ):
        (tmp_path / f"{name}.jpg").write_bytes(data)
    checkpoint = str(write_detector(tmp_path / "best.pt"))
    names = ["half", "odd", "missing"]
    found = explain_images(
        [str(tmp_path / f"{name}.jpg") for name in names], checkpoint, None, tell=False, cam=False
    )
    assert "damaged or cut short" in found[0].error and "cannot be read" in found[2].error
    assert found[1].verdict and "extraneous bytes" in found[1].warning
    assert "  warning: Corrupt JPEG data: " in as_text(found)
    assert "Warning: Corrupt" in as_html(found, checkpoint="x", model=None, tell=False)
