"""Explain single images: verdict, Grad-CAM map and a language model's text, as text, JSON or HTML."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dataio.core.errors import UserError
from dataio.images.opening import MEGAPIXELS, complaint_of, quiet_pillow
from dataio.vqa.blind_baselines import label_in_text
from dataio.vqa.conversations import load_rgb
from engines.attribution.gradcam import grad_cam, overlay
from engines.mlm.vqa_answers import NEW_TOKENS, Answerer
from engines.predict.detector import Detector, predict_file, to_png

_QUESTION = "Is this image real or artificially generated? Please explain your answer."
_HINT = "A detector says that this image is {verdict}, with a probability of {p:.0%}. {question}"
_HINT_UNSURE = "A detector is unsure: this image is fake with a probability of {p:.0%}. {question}"
_UNCALIBRATED = (
    "the detector's probabilities are not calibrated (see telltale calibrate), so 90 % may not "
    "mean right nine times in ten"
)
# The detector's verdicts in the language model's terms; it has none for "unsure".
_VERDICTS = {"real": "Real", "AI-generated": "Fake", "unsure": "Unsure"}


@dataclass
class Explanation:
    """The answers about one image.

    Fields of a model that was not asked are empty; `error` says why an image cannot be read, and
    `warning` what is odd about one that can.
    """

    path: str
    error: str = ""
    warning: str = ""
    verdict: str = ""
    p_fake: float | None = None
    calibrated: bool = False
    generator: str = ""
    p_generator: float | None = None
    object: str = ""
    explanation: str = ""
    explanation_verdict: str = ""
    explanation_p_fake: float | None = None
    told_the_verdict: bool = False
    picture: str = ""
    cam: str = ""


def explain_images(
    paths: Sequence[str],
    checkpoint: str | None,
    answerer: Answerer | None,
    *,
    tell: bool,
    cam: bool,
    max_megapixels: int | None = None,
) -> list[Explanation]:
    """Ask the detector, the language model, or both about each image.

    Args:
        checkpoint: the detector's; None for no detector. answerer: the language model, or None.
        tell: include the detector's verdict in the language model's prompt. cam: make Grad-CAM maps.
        max_megapixels: larger images are not read; None is as in the detector's training shards.

    Raises:
        UserError: neither is given, or `tell` without a detector, or the checkpoint is bad.
    """
    if checkpoint is None and answerer is None:
        raise UserError("no model: give the checkpoint of a detector, a language model, or both")
    if tell and (checkpoint is None or answerer is None):
        raise UserError("needs both a detector and a language model", field="tell_verdict")
    detector = Detector(checkpoint, 1, max_megapixels) if checkpoint is not None else None
    if answerer is not None:
        limit = detector.policy.max_megapixels if detector is not None else MEGAPIXELS
        answerer.max_megapixels = max_megapixels or limit
    explanations = []
    for path in paths:
        try:
            with quiet_pillow():
                explanations.append(_explain(path, detector, answerer, tell, cam))
        # A faulty image is reported; the others still have their turn.
        except UserError as error:
            explanations.append(Explanation(path=str(path), error=str(error)))
    return explanations


def _explain(
    path: str, detector: Detector | None, answerer: Answerer | None, tell: bool, cam: bool
) -> Explanation:
    result = Explanation(path=str(path), told_the_verdict=tell)
    if detector is not None:
        prediction, result.warning = predict_file(detector, path)
        result.verdict, result.calibrated = _VERDICTS[prediction.verdict], prediction.calibrated
        result.p_fake, result.generator = prediction.p_fake, prediction.generator
        result.p_generator, result.object = prediction.p_generator, prediction.object
        picture = detector.input_picture(prediction)
        result.picture = _data_uri(picture)
        if cam:
            heat = grad_cam(detector.model, prediction.pixels.clone(), fake=result.verdict != "Real")
            result.cam = _data_uri(overlay(picture, heat))
    if answerer is not None:
        if detector is None:
            thumbnail = load_rgb(path, answerer.max_megapixels)
            result.warning = complaint_of(thumbnail)
            thumbnail.thumbnail((384, 384))
            result.picture = _data_uri(np.asarray(thumbnail))
        question = _QUESTION
        if tell and result.p_fake is not None:
            hint = _HINT_UNSURE if result.verdict == "Unsure" else _HINT
            p_verdict = 1 - result.p_fake if result.verdict == "Real" else result.p_fake
            question = hint.format(verdict=result.verdict.lower(), p=p_verdict, question=_QUESTION)
        (result.explanation,) = answerer.answers([question], [path], NEW_TOKENS["open"])
        result.explanation_verdict = label_in_text(result.explanation) or "unparsed"
        item = {"id": path, "question": question, "ground_truth": ""}
        (result.explanation_p_fake,) = answerer.p_fake([item], [path])
    return result


def _data_uri(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()


def as_json(explanations: Sequence[Explanation]) -> str:
    """A JSON list of objects, without the pictures."""
    rows = [
        {k: v for k, v in asdict(item).items() if k not in ("picture", "cam")} | {"has_cam": bool(item.cam)}
        for item in explanations
    ]
    return json.dumps(rows, indent=2) + "\n"


def as_text(explanations: Sequence[Explanation]) -> str:
    """A paragraph for each image."""
    parts = []
    for item in explanations:
        lines = [item.path]
        if item.error:
            lines.append(f"  error: {item.error}")
        if item.warning:
            lines.append(f"  warning: {item.warning}")
        if item.verdict:
            lines.append(
                f"  detector: {item.verdict}, P(fake) {item.p_fake:.3f} "
                f"({'calibrated' if item.calibrated else 'not calibrated'}), likeliest generator "
                f"{item.generator} ({item.p_generator:.3f})"
                + (f", object {item.object}" if item.object else "")
            )
        if item.explanation_verdict:
            score = "" if item.explanation_p_fake is None else f", P(fake) {item.explanation_p_fake:.3f}"
            hint = (
                ", told the detector's verdict"
                if item.told_the_verdict
                else ", not told the detector's verdict"
            )
            lines.append(f"  language model ({item.explanation_verdict}{score}{hint}): {item.explanation}")
        if disagree(item):
            lines.append("  the two disagree")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def disagree(item: Explanation) -> bool:
    """Whether detector and language model gave different verdicts."""
    return (
        bool(item.verdict)
        and item.explanation_verdict in ("Fake", "Real")
        and item.verdict != item.explanation_verdict
    )


def as_html(
    explanations: Sequence[Explanation], *, checkpoint: str | None, model: str | None, tell: bool
) -> str:
    """One self-contained HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    rows = [(item, disagree(item)) for item in explanations]
    return environment.get_template("explain.html.j2").render(
        rows=rows,
        checkpoint=checkpoint,
        model=model,
        tell=tell,
        note="" if any(item.calibrated for item in explanations) else _UNCALIBRATED,
        asked=_HINT.format(verdict="...", p=0, question=_QUESTION).replace("0%", "...")
        if tell
        else _QUESTION,
    )
