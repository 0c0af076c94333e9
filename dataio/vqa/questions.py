"""Questions about labeled images: finetuning conversations and benchmarks.

Everything is drawn from the labels (real or fake, generator, object) with a seed. Answers do
not describe artifacts, because the labels do not. Benchmarks are balanced so that no baseline
of `dataio.vqa.blind_baselines` beats chance, and are not written if one does.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataio.core.atomic import write_text
from dataio.core.errors import UserError, writing
from dataio.core.log import log
from dataio.layouts.manifest import ManifestLayout
from dataio.shards.shard_set import ShardSet
from dataio.vqa.blind_baselines import (
    LETTERS,
    MULTIPLE_CHOICE,
    TRUE_FALSE,
    baselines_above_chance,
    blind_scores,
    chance_of,
)
from dataio.vqa.conversations import IMAGE_PLACEHOLDER, read_image_bytes
from dataio.vqa.sample_text import check_label

NATURE = "nature"
QUESTION_FORMATS = ("explain", "short", "choice")
EXPLAIN_QUESTIONS = (
    "Is this image real or fake?",
    "Is this image real or artificially generated? Please explain your answer.",
    "Do you think this is a photograph or an image made by artificial intelligence?",
    "Was this image taken by a camera or made by a generator?",
    "Can you tell whether this image is genuine?",
    "Is what you see a real photograph or a generated picture?",
    "Does this look like a real image or like an artificial one? What does it show?",
    "Please say whether the image is real or generated, and what it shows.",
)
SHORT_QUESTIONS = (
    "Is this image real or fake? Answer with just Real or Fake.",
    "Is this image real or artificially generated? Just answer with Real or Fake.",
    "Was this made by a camera or a generator? Answer Real for a camera and Fake for a generator.",
    "Real or Fake: which word is right for this image?",
)
CHOICE_QUESTIONS = (
    "Which of these describes the image?",
    "What is this image?",
    "Which answer is right for this image?",
)
CHOICE_END = "Answer with just the letter."


@dataclass(frozen=True)
class LabeledImage:
    """An image and its labels.

    Attributes:
        image: a path, or "TAR/MEMBER". generator: "nature" for a photograph.
        object: its name, or "" if unknown.
        group: images of one group stay in one split; "" for none.
    """

    image: str
    generator: str
    object: str
    group: str = ""

    @property
    def fake(self) -> bool:
        return self.generator != NATURE


@dataclass(frozen=True, kw_only=True)
class VqaSizes:
    """How many conversations and benchmark items to write.

    Attributes:
        train, val: finetuning conversations. true_false, multiple_choice: benchmark items.
        formats: kinds of questions in the conversations, in equal shares.
        seed: of all random choices.
    """

    train: int = 1000
    val: int = 100
    true_false: int = 200
    multiple_choice: int = 200
    formats: tuple[str, ...] = QUESTION_FORMATS
    seed: int = 0


def images_of_shards(folder: str | Path, split: str) -> list[LabeledImage]:
    """The images of one split of a shard folder, as members of its tars."""
    shards = ShardSet(folder, split)
    generators, objects = shards.labels.generators, shards.labels.objects
    images = []
    for row in shards.rows:
        tar = shards.folder / shards.shards[int(row["shard"])]["file"]
        name = objects[int(row["object"])] if row["object"] >= 0 else ""
        images.append(
            LabeledImage(f"{tar}/{int(row['key']):09d}.jpg", generators[int(row["generator"])], name)
        )
    return images


def images_of_manifest(
    file: str | Path, root: str | Path | None = None, *, real: str | None = None
) -> dict[str, list[LabeledImage]]:
    """The images of a CSV (path, generator, object[, split, group]), by split; see `ManifestLayout`."""
    layout = ManifestLayout(file, root=root, real=real, field="manifest")
    for note in layout.notes:
        log.warning(note)
    if not Path(layout.root).is_dir():
        raise UserError(
            "expected a folder of images; write shards from an archive first", field="root", value=layout.root
        )
    images: dict[str, list[LabeledImage]] = {"train": [], "val": [], "test": []}
    for record in layout.records():
        name = layout.objects[record.object] if record.object is not None else ""
        path = os.path.join(layout.root, record.path)
        images[record.split].append(LabeledImage(path, record.generator, name, record.group))
    return images


def write_vqa(images: dict[str, list[LabeledImage]], output: str | Path, sizes: VqaSizes) -> dict[str, Any]:
    """Write conversations.json, val.json, true_false.json, multiple_choice.json, summary.json.

    Args:
        images: by split. Conversations use train and val, benchmarks use test.
        output: folder; image paths in the files are relative to it.

    Returns:
        the summary: counts and the accuracy of the image-blind baselines.

    Raises:
        UserError: too few real or fake images, a benchmark on which an image-blind baseline
            beats chance, a label that is no text (see `check_label`), or a folder that cannot be
            written. Only in the last case something may have been written.
    """
    output = Path(output)
    for kind in ("generator", "object"):
        for label in {getattr(image, kind) for part in images.values() for image in part} - {""}:
            check_label(label, kind, IMAGE_PLACEHOLDER)
    rng = np.random.default_rng(sizes.seed)
    train = _balanced(images["train"], sizes.train, rng, "train")
    val = _balanced(images["val"], sizes.val, rng, "val")
    unseen = _without(images["test"], [*train, *val], sizes)
    benchmarks = {
        TRUE_FALSE: _true_false(_balanced(unseen, sizes.true_false, rng, "test"), rng),
        MULTIPLE_CHOICE: _multiple_choice(unseen, sizes.multiple_choice, rng),
    }
    names = [image.object for image in images["train"] if image.object]
    files: dict[str, list[dict[str, Any]]] = {
        "conversations": _conversations(train, names, sizes.formats, rng),
        "val": _conversations(val, names, sizes.formats, rng),
        **benchmarks,
    }
    for kind, items in benchmarks.items():
        refuse_if_guessable(kind, items)
    summary = {
        "format": "telltale-vqa",
        "version": 1,
        "seed": sizes.seed,
        "counts": {name: len(items) for name, items in files.items()},
        "generators": {
            name: dict(sorted(Counter(item["metadata"]["generator"] for item in items).items()))
            for name, items in files.items()
        },
        "blind": {kind: blind_scores(items) for kind, items in benchmarks.items() if items},
        "left_out_of_test": len(images["test"]) - len(unseen),
    }
    with writing(output, field="output"):
        output.mkdir(parents=True, exist_ok=True)
        for name, items in files.items():
            for item in items:
                item["image"] = os.path.relpath(item["image"], output)
            if items:
                write_text(output / f"{name}.json", json.dumps(items, indent=1) + "\n")
        write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def refuse_if_guessable(name: str, items: Sequence[dict[str, Any]]) -> None:
    """Raise a UserError if an image-blind baseline beats chance on a benchmark."""
    better = baselines_above_chance(items)
    if better:
        scores = ", ".join(f"{baseline} {accuracy:.1%}" for baseline, accuracy, _ in better)
        raise UserError(
            f"{name}: not written, because an image-blind baseline beats chance ({chance_of(items):.0%}): "
            f"{scores}; use more images, or more evenly labeled ones"
        )


def _without(
    test: Iterable[LabeledImage], used: Iterable[LabeledImage], sizes: VqaSizes
) -> list[LabeledImage]:
    """The test images that share neither bytes nor group with a training image."""
    if sizes.true_false == sizes.multiple_choice == 0:
        return []
    digests, groups = set(), set()
    for image in used:
        digests.add(_digest(image.image))
        groups.add(image.group)
    groups.discard("")
    return [image for image in test if image.group not in groups and _digest(image.image) not in digests]


def _digest(image: str) -> bytes:
    return hashlib.sha256(read_image_bytes(image)).digest()


def _balanced(
    images: Sequence[LabeledImage], count: int, rng: np.random.Generator, split: str
) -> list[LabeledImage]:
    """Half photographs, half fakes spread evenly over their generators, in random order."""
    if count == 0:
        return []
    if count % 2:
        raise UserError(f"{count} questions for {split}: expected an even number, half about real images")
    pools: dict[str, list[LabeledImage]] = defaultdict(list)
    for place in rng.permutation(len(images)):
        pools[images[place].generator].append(images[place])
    fakes = sorted(name for name in pools if name != NATURE)
    half = count // 2
    if len(pools[NATURE]) < half or sum(len(pools[name]) for name in fakes) < half:
        available = ", ".join(f"{len(pools[name])} {name}" for name in [NATURE, *fakes])
        raise UserError(
            f"{count} questions for {split} need {half} real and {half} fake images, it has {available}; "
            "ask for fewer"
        )
    chosen = pools[NATURE][:half]
    while len(chosen) < count:
        for name in fakes:
            if pools[name] and len(chosen) < count:
                chosen.append(pools[name].pop())
    return [chosen[place] for place in rng.permutation(count)]


def _item(number: int, kind: str, image: LabeledImage, question: str, truth: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-{number:06d}",
        "image": image.image,
        "question": question,
        "ground_truth": truth,
        "answer": "",
        "metadata": _metadata(image),
    }


def _metadata(image: LabeledImage) -> dict[str, str]:
    shown = {"generator": "natural" if image.generator == NATURE else image.generator}
    return {**shown, "object_category": image.object} if image.object else shown


def _true_false(images: Sequence[LabeledImage], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Items in which every wording occurs equally often for real and for fake images."""
    items, asked = [], Counter[bool]()
    first = int(rng.integers(len(SHORT_QUESTIONS)))
    for number, image in enumerate(images):
        question = SHORT_QUESTIONS[(first + asked[image.fake]) % len(SHORT_QUESTIONS)]
        asked[image.fake] += 1
        items.append(_item(number, TRUE_FALSE, image, question, "Fake" if image.fake else "Real"))
    return items


def _option(name: str, fake: bool) -> str:
    """An option's text. Both labels have four letters, so its length depends on the object alone."""
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"A {'fake' if fake else 'real'} photograph of {article} {name}."


def _spoken(name: str) -> str:
    """An object's name in a sentence: ImageNet's first synonym, without underscores."""
    return name.split(",")[0].replace("_", " ").strip()


def choice_question(
    image: LabeledImage, other: str, letter: str, wording: str, rng: np.random.Generator
) -> tuple[str, str]:
    """A question with four options, and its answer.

    The options combine both labels with the image's object and with another object.

    Args:
        other: an object that the image does not show. letter: of the right option.
    """
    right = _option(_spoken(image.object), image.fake)
    wrong = [
        _option(_spoken(image.object), not image.fake),
        _option(_spoken(other), image.fake),
        _option(_spoken(other), not image.fake),
    ]
    texts = [wrong[place] for place in rng.permutation(3)]
    texts.insert(LETTERS.index(letter), right)
    lines = "\n".join(f"{name}: {text}" for name, text in zip(LETTERS, texts, strict=True))
    return f"{wording}\n{lines}\n{CHOICE_END}", letter


def _multiple_choice(
    images: Sequence[LabeledImage], count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    known = [image for image in images if image.object]
    names = [image.object for image in known]
    if count and len({_spoken(name) for name in names}) < 2:
        raise UserError(
            "multiple choice needs at least two objects among the test images, found "
            f"{len(set(names))}; ask for 0 multiple-choice items"
        )
    chosen = _balanced(known, count, rng, "multiple choice (known objects)")
    items = []
    for number, image in enumerate(chosen):
        # Letters alternate, and so do longer and shorter distractors: neither the letter nor the
        # length carries information about the answer.
        other = distractor(image.object, names, longer=number // len(LETTERS) % 2 == 0, rng=rng)
        wording = CHOICE_QUESTIONS[number // 2 % len(CHOICE_QUESTIONS)]
        question, letter = choice_question(image, other, LETTERS[number % len(LETTERS)], wording, rng)
        items.append(_item(number, MULTIPLE_CHOICE, image, question, letter))
    return [items[place] for place in rng.permutation(len(items))]


def distractor(name: str, names: Sequence[str], *, longer: bool, rng: np.random.Generator) -> str:
    """Another object of `names` with an option of the same length, else a longer or shorter one.

    Drawn in proportion to its frequency, so that an object's frequency carries no information
    about the answer.
    """
    length = len(_option(_spoken(name), False))
    others = [other for other in names if _spoken(other) != _spoken(name)]
    differences = [len(_option(_spoken(other), False)) - length for other in others]
    for candidates in (
        [o for o, d in zip(others, differences, strict=True) if d == 0],
        [o for o, d in zip(others, differences, strict=True) if (d > 0) == longer],
        others,
    ):
        if candidates:
            return candidates[int(rng.integers(len(candidates)))]
    raise ValueError("no other object")


def _conversations(
    images: Sequence[LabeledImage], names: Sequence[str], formats: Sequence[str], rng: np.random.Generator
) -> list[dict[str, Any]]:
    samples = []
    several = len({_spoken(name) for name in names}) > 1
    for number, image in enumerate(images):
        kind = formats[number % len(formats)]
        if kind == "choice" and not (image.object and several):
            kind = "explain"
        if kind == "choice":
            other = distractor(image.object, names, longer=bool(rng.integers(2)), rng=rng)
            letter = LETTERS[int(rng.integers(len(LETTERS)))]
            wording = CHOICE_QUESTIONS[int(rng.integers(len(CHOICE_QUESTIONS)))]
            question, answer = choice_question(image, other, letter, wording, rng)
        elif kind == "short":
            question = SHORT_QUESTIONS[int(rng.integers(len(SHORT_QUESTIONS)))]
            answer = "Fake" if image.fake else "Real"
        else:
            question = EXPLAIN_QUESTIONS[int(rng.integers(len(EXPLAIN_QUESTIONS)))]
            answer = explanation(image)
        turns = [
            {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        samples.append(
            {
                "id": f"{kind}-{number:06d}",
                "image": image.image,
                "conversations": turns,
                "metadata": _metadata(image),
            }
        )
    return samples


def explanation(image: LabeledImage) -> str:
    """The answer to an open question: the label first, then the object and the generator."""
    shown = f" of {_with_article(_spoken(image.object))}" if image.object else ""
    if not image.fake:
        return f"This is a real image. It is a photograph{shown}."
    maker = image.generator.replace("_", " ")
    return f"This is a fake image. It is a picture{shown} made by {maker}."


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
