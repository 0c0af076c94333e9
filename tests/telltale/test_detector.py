"""The Python API's detector: every kind of image, the command's own numbers, and explanations."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

import telltale
from dataio.images.opening import Undecodable
from dataio.sources.inputs import find_inputs
from engines.attribution.gradcam import generator_score, grad_cam, grad_cams
from engines.predict.detector import Detector
from engines.predict.predict import predict
from telltale.results import ImagePrediction, Predictions
from tests.support import write_detector


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_detector(folder / "best.pt")
    return folder


@pytest.fixture(scope="module")
def detector(run):
    return telltale.load(run)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 255, (3, 40, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, pixels):
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).save(folder / "b.jpg", quality=80)
    (folder / "c.png").write_bytes(b"no image")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.write(folder / "b.jpg", "b.jpg")
    return folder


def test_rows_are_those_of_the_command(run, detector, photos):
    rows = detector.predict([photos, photos / "missing.png", photos / "more.zip"])
    paths = [str(photos), str(photos / "missing.png"), str(photos / "more.zip")]
    expected = list(predict(Detector(run), find_inputs(paths, io.BytesIO()), workers=1))
    assert len(rows) == len(expected) == 5
    for row, other in zip(rows, expected, strict=True):
        assert vars(row).items() <= vars(other).items()
    assert [row.error is None for row in rows] == [True, True, False, False, True]
    assert rows[1].p_fake == pytest.approx(rows[4].p_fake, abs=1e-6)


def test_an_image_is_the_same_from_a_path_bytes_pillow_or_an_array(detector, photos, pixels):
    path = photos / "a.png"
    given = [path, str(path), path.read_bytes(), Image.open(path), pixels[0], Image.fromarray(pixels[0])]
    rows = detector.predict(given)
    np.testing.assert_allclose([row.p_fake for row in rows], rows[0].p_fake, atol=1e-6)
    assert [row.path for row in rows] == [str(path)] * 2 + [f"image[{n}]" for n in range(2, 6)]
    for one in given:
        assert detector.predict(one)[0].p_fake == pytest.approx(rows[0].p_fake, abs=1e-5)
    several = detector.predict(pixels)
    assert len(several) == 3 and len({row.p_fake for row in several}) == 3
    assert detector.predict(image for image in pixels) == several
    assert len(detector.predict([])) == 0


def test_pillow_images_of_every_mode_are_upright(detector, pixels):
    image = Image.fromarray(pixels[0])
    modes = [image.convert(mode) for mode in ("L", "P", "RGBA", "CMYK", "YCbCr", "F", "1")]
    assert all(row.error is None for row in detector.predict(modes))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(turned, "PNG", exif=exif)
    upright, plain = detector.predict([Image.open(turned), image.rotate(-90, expand=True)])
    assert upright.p_fake == pytest.approx(plain.p_fake, abs=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("https://example.org/a.png", "URLs are not fetched"),
        (["data:image/png;base64,AAAA"], "URLs are not fetched"),
        (np.zeros((8, 8, 3), np.float32), r"image\[0\]: expected uint8 \[H, W, 3\], got float32 \[8, 8, 3\]"),
        ([np.zeros((8, 8), np.uint8)], "expected uint8"),
        ([np.zeros((0, 8, 3), np.uint8)], "at least one pixel"),
        ([3], "int: not an image"),
        (3, "int: not an image"),
    ],
)
def test_what_is_not_an_image_is_refused(detector, images, message):
    with pytest.raises(telltale.UserError, match=message) as caught:
        detector.predict(images)
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_refused(detector, tmp_path, photos):
    with pytest.raises(telltale.UserError, match="batch 0: expected 1 or more"):
        telltale.load(tmp_path, batch=0)
    with pytest.raises(telltale.UserError, match=r"best\.pt"):
        telltale.load(tmp_path)
    with pytest.raises(telltale.UserError, match="workers 0"):
        detector.predict([], workers=0)
    with pytest.raises(
        telltale.UserError, match="target 'unicorn': unknown; expected one of fake, real, nat"
    ):
        detector.explain(photos / "a.png", "unicorn")
    for image, message in [
        (photos, "several images"),
        (photos / "c.png", "not a readable image"),
        (photos / "missing.png", "cannot be read"),
    ]:
        with pytest.raises(telltale.UserError, match=message):
            detector.explain(image)


def test_explanations_are_grad_cams(run, detector, photos, pixels):
    by_name = {
        target: detector.explain(photos / "a.png", target) for target in ("fake", "real", "adm", "cat")
    }
    engine = Detector(run)
    (answer,) = engine.predict([engine.prepare((photos / "a.png").read_bytes())])
    assert not isinstance(answer, Undecodable)
    heats = {"fake": True, "real": False}
    for target, fake in heats.items():
        expected = grad_cam(engine.model, answer.pixels.clone(), fake=fake)
        np.testing.assert_allclose(by_name[target].heat, expected, atol=1e-5)
    expected = grad_cams(engine.model, answer.pixels.clone(), generator_score(engine.model, "adm")).heat[0]
    np.testing.assert_allclose(by_name["adm"].heat, expected, atol=1e-5)
    assert not np.allclose(by_name["fake"].heat, by_name["cat"].heat)
    for target, explanation in by_name.items():
        assert explanation.target == target and explanation.heat.dtype == np.float32
        assert (
            explanation.heat.shape == (32, 32) and 0 <= explanation.heat.min() <= explanation.heat.max() <= 1
        )
        assert explanation.overlay.size == explanation.picture.size == (32, 32)
        for region in explanation.regions:
            box = explanation.heat[region.top : region.bottom, region.left : region.right]
            assert box.max() >= region.peak >= 0.5 and 0 < region.share <= 1
    assert by_name["fake"].prediction == detector.predict(photos / "a.png")[0]
    assert detector.explain(pixels[0]).prediction.path == "image[0]"


def test_results_are_a_sequence_and_a_table():
    rows = Predictions([ImagePrediction("a", verdict="real", p_fake=0.25), ImagePrediction("b", error="bad")])
    assert rows[1:] == Predictions([rows[1]]) and rows[-1].error == "bad" and len(rows) == 2
    frame = rows.to_dataframe()
    assert list(frame["path"]) == ["a", "b"] and frame.loc[0, "p_fake"] == 0.25
    assert list(Predictions([]).to_dataframe().columns) == list(frame.columns)


def test_importing_telltale_is_cheap():
    program = (
        "import sys, telltale; heavy = {'torch', 'numpy', 'pandas', 'PIL', 'nvidia', 'engines', 'dataio'}; "
        "print(sorted(heavy & sys.modules.keys()), telltale.__version__, *telltale.__all__); "
        "assert {*telltale.__all__} <= {*dir(telltale)}; telltale.Predictions; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    for name in done.stdout.split()[2:]:
        assert getattr(telltale, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'detekt'"):
        telltale.detekt  # noqa: B018
