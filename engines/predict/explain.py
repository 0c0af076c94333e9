"""Verdict, Grad-CAM and words for single images, as text, JSON or a page."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from dataio.core.errors import UserError
from dataio.vqa.blind_baselines import label_in_text
from engines.attribution.gradcam import grad_cam, overlay
from engines.mlm.vqa_answers import NEW_TOKENS, Answerer
from engines.predict.detector import Detector, predict_file, to_png

QUESTION = "Is this image real or artificially generated? Please explain your answer."
TOLD = "A detector says that this image is {verdict}, with a probability of {p:.0%}. {question}"
TOLD_UNSURE = "A detector is unsure: this image is fake with a probability of {p:.0%}. {question}"
UNCALIBRATED = (
    "the detector's probabilities are not calibrated (see launch/calibrate.py), so 90 % may not "
    "mean right nine times in ten"
)
# The words that the language model uses, and one that it does not.
_VERDICTS = {"real": "Real", "AI-generated": "Fake", "unsure": "Unsure"}


@dataclass
class Explanation:
    """What is said of one image; empty where nobody was asked, `error` where it cannot be read."""

    path: str
    error: str = ""
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
    paths: Sequence[str], checkpoint: str | None, answerer: Answerer | None, *, tell: bool, cam: bool
) -> list[Explanation]:
    """Ask the detector, the language model, or both about each image.

    Args:
        checkpoint: the detector's; None asks no detector. answerer: the language model or None.
        tell: give the detector's verdict to the language model. cam: make Grad-CAMs.

    Raises:
        UserError: neither is given, or `tell` without a detector, or the checkpoint is bad.
    """
    if checkpoint is None and answerer is None:
        raise UserError("give --checkpoint (a detector), --model (a language model) or both")
    if tell and (checkpoint is None or answerer is None):
        raise UserError("--tell-verdict needs both --checkpoint and --model")
    detector = Detector(checkpoint, batch=1) if checkpoint is not None else None
    found = []
    for path in paths:
        try:
            found.append(_explain(path, detector, answerer, tell, cam))
        except UserError as error:
            found.append(Explanation(path=str(path), error=str(error)))
    return found


def _explain(
    path: str, detector: Detector | None, answerer: Answerer | None, tell: bool, cam: bool
) -> Explanation:
    result = Explanation(path=str(path), told_the_verdict=tell)
    if detector is not None:
        prediction = predict_file(detector, path)
        result.verdict, result.calibrated = _VERDICTS[prediction.verdict], prediction.calibrated
        result.p_fake, result.generator = prediction.p_fake, prediction.generator
        result.p_generator, result.object = prediction.p_generator, prediction.object
        picture = detector.input_picture(prediction)
        result.picture = _data_uri(picture)
        if cam:
            heat = grad_cam(detector.model, prediction.pixels.clone(), fake=result.verdict != "Real")
            result.cam = _data_uri(overlay(picture, heat))
    if answerer is not None:
        question = QUESTION
        if tell and result.p_fake is not None:
            told = TOLD_UNSURE if result.verdict == "Unsure" else TOLD
            sure = 1 - result.p_fake if result.verdict == "Real" else result.p_fake
            question = told.format(verdict=result.verdict.lower(), p=sure, question=QUESTION)
        (result.explanation,) = answerer.answers([question], [path], NEW_TOKENS["open"])
        result.explanation_verdict = label_in_text(result.explanation) or "unparsed"
        item = {"id": path, "question": question, "ground_truth": ""}
        (result.explanation_p_fake,) = answerer.p_fake([item], [path])
        if not result.picture:
            with Image.open(path) as opened:
                shown = opened.convert("RGB")
                shown.thumbnail((384, 384))
                result.picture = _data_uri(np.asarray(shown))
    return result


def _data_uri(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()


def as_json(found: Sequence[Explanation]) -> str:
    """A list of objects, without the pictures."""
    rows = [
        {k: v for k, v in asdict(one).items() if k not in ("picture", "cam")} | {"has_cam": bool(one.cam)}
        for one in found
    ]
    return json.dumps(rows, indent=2) + "\n"


def as_text(found: Sequence[Explanation]) -> str:
    """A paragraph for each image."""
    parts = []
    for one in found:
        lines = [one.path]
        if one.error:
            lines.append(f"  error: {one.error}")
        if one.verdict:
            lines.append(
                f"  detector: {one.verdict}, P(fake) {one.p_fake:.3f} "
                f"({'calibrated' if one.calibrated else 'not calibrated'}), likeliest generator "
                f"{one.generator} ({one.p_generator:.3f})" + (f", object {one.object}" if one.object else "")
            )
        if one.explanation_verdict:
            score = "" if one.explanation_p_fake is None else f", P(fake) {one.explanation_p_fake:.3f}"
            told = (
                ", told the detector's verdict"
                if one.told_the_verdict
                else ", not told the detector's verdict"
            )
            lines.append(f"  language model ({one.explanation_verdict}{score}{told}): {one.explanation}")
        if disagree(one):
            lines.append("  the two disagree")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def disagree(one: Explanation) -> bool:
    """Whether detector and language model gave different verdicts."""
    return (
        bool(one.verdict)
        and one.explanation_verdict in ("Fake", "Real")
        and one.verdict != one.explanation_verdict
    )


def as_html(found: Sequence[Explanation], *, checkpoint: str | None, model: str | None, tell: bool) -> str:
    """One page with everything in it; opens without a network."""
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    rows = [(one, disagree(one)) for one in found]
    return page.render(
        rows=rows,
        checkpoint=checkpoint,
        model=model,
        tell=tell,
        note="" if any(one.calibrated for one in found) else UNCALIBRATED,
        asked=TOLD.format(verdict="...", p=0, question=QUESTION).replace("0%", "...") if tell else QUESTION,
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explained verdicts</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c1c1c;
  background: #fff }
article { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem;
  border-top: 1px solid #bbb; padding: 1.2rem 0 }
article h2 { grid-column: 1 / -1; font-size: 1rem; margin: 0; overflow-wrap: anywhere }
figure { margin: 0 } img { width: 100%; max-width: 18rem; image-rendering: auto; border-radius: 3px }
figcaption { font-size: .85rem; color: #555 }
dl { margin: 0 } dt { font-size: .85rem; color: #555 } dd { margin: 0 0 .6rem }
.verdict { font-weight: 700 } .fake { color: #a02000 } .real { color: #00582c } .unsure { color: #6a5200 }
.note { background: #f4f1e8; padding: .6rem .9rem; border-left: 4px solid #b39000 }
.error { color: #a02000 }
</style></head><body>
<h1>Explained verdicts</h1>
<p>{% if checkpoint %}Detector: <code>{{ checkpoint }}</code>. {% endif %}
{% if model %}Language model: <code>{{ model }}</code>, asked: “{{ asked }}”{% endif %}</p>
{% if model %}<p class="note">{% if tell %}The language model was told the detector's verdict before it answered:
its words may repeat that verdict and are no second opinion.{% else %}The language model was not told the detector's
verdict: its words come from the image alone. They may still name traces that are not there.{% endif %}</p>{% endif %}
{% if checkpoint and note %}<p class="note">Note: {{ note }}.</p>{% endif %}
{% for one, disagree in rows %}
<article><h2>{{ one.path }}</h2>
{% if one.error %}<p class="error">{{ one.error }}</p>{% else %}
{% if one.picture %}<figure><img src="{{ one.picture }}" alt="the image"><figcaption>the image{% if checkpoint %}
as the detector sees it{% endif %}</figcaption></figure>{% endif %}
{% if one.cam %}<figure><img src="{{ one.cam }}" alt="Grad-CAM"><figcaption>Grad-CAM: red speaks for
“{{ 'real' if one.verdict == 'Real' else 'fake' }}”</figcaption></figure>{% endif %}
<dl>{% if one.verdict %}<dt>Detector</dt><dd><span class="verdict {{ one.verdict|lower }}">{{ one.verdict }}</span>,
P(fake) {{ "%.3f"|format(one.p_fake) }}<br>likeliest: {{ one.generator }}
({{ "%.3f"|format(one.p_generator) }}){% if one.object %}<br>object: {{ one.object }}{% endif %}</dd>{% endif %}
{% if one.explanation_verdict %}<dt>Language model</dt><dd>
<span class="verdict {{ one.explanation_verdict|lower }}">{{ one.explanation_verdict }}</span>
{%- if one.explanation_p_fake is not none %}, P(fake) {{ "%.3f"|format(one.explanation_p_fake) }}{% endif %}<br>
{{ one.explanation }}</dd>{% endif %}
{% if disagree %}<dt class="error">The two disagree.</dt>{% endif %}</dl>
{% endif %}</article>
{% endfor %}
</body></html>
"""
