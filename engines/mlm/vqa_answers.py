"""A language model's answers to a benchmark, with the probability that it gives to "fake"."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from dataio.core.errors import UserError, one_line
from dataio.core.log import log
from dataio.images.opening import MEGAPIXELS
from dataio.layouts.labels import look_of
from dataio.vqa.blind_baselines import MULTIPLE_CHOICE, OPEN, VqaItem, kind_of, label_in_text, options_of
from dataio.vqa.conversations import IMAGE_PLACEHOLDER, load_rgb, resolve_image
from dataio.vqa.sample_text import UniqueIds, escaped, is_blank, text_fault
from models.tinyllava.model import TinyLlavaForConditionalGeneration, image_tokens
from models.tinyllava.text import END, MARKERS, preprocess_image, tokenize_turns

NEW_TOKENS = {"true_false": 16, "multiple_choice": 16, "open": 128}
VERDICT_START = " This is a"  # the beginning of an open answer, up to its label
_VERDICTS = {"real": "Real", "fake": "Fake"}
_WORDS = {"Fake": (" fake", " Fake"), "Real": (" real", " Real")}


def read_items(path: str | Path) -> list[dict[str, Any]]:
    """A benchmark or answers file: a list of {id, image, question, ground_truth[, answer]}.

    Raises:
        UserError: missing or invalid; names the item and the key.
    """
    path = Path(path)
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        expected = "a benchmark that write_vqa wrote, or the answers.json of an evaluation"
        raise UserError(f"{path}: no such file; expected {expected}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: expected a list of items, each with id, image, question and ground_truth")
    ids = UniqueIds()
    for number, item in enumerate(items):
        for key in ("id", "question", "ground_truth"):
            if not isinstance(item, dict) or not isinstance(item.get(key), str):
                raise UserError(
                    f"{path}: item {number} has no text {key!r}; expected id, image, question, ground_truth"
                )
        if not isinstance(item.get("metadata", {}), dict):
            raise UserError(f"{path}: item {item['id']} has metadata that is not an object")
        # "real" and "Fake." are answers to a true/false question, spelled otherwise.
        item["ground_truth"] = _VERDICTS.get(look_of(item["ground_truth"].strip(" .")), item["ground_truth"])
        item["id"] = ids.name(escaped(item["id"]))
        if fault := _item_fault(item):
            raise UserError(f"{path}: item {item['id']} {fault}; correct it")
    if ids.repeated:
        log.info(f"{path}: {ids}")
    return items


def _item_fault(item: VqaItem) -> str:
    """Why a question cannot be asked or scored, "" if it can."""
    texts = {key: item.get(key) for key in ("question", "ground_truth", "answer", "image")} | item.get(
        "metadata", {}
    )
    for key, text in texts.items():
        if isinstance(text, str) and (fault := text_fault(text)):
            return f"has in its {key} {fault}"
    for key in ("question", "ground_truth"):
        if is_blank(item[key].replace(IMAGE_PLACEHOLDER, "")):
            return f"has an empty {key}"
    if item["question"].count(IMAGE_PLACEHOLDER) > 1:
        return f"has {IMAGE_PLACEHOLDER} more than once in its question, expected one image"
    for marker in MARKERS:
        if marker != IMAGE_PLACEHOLDER and marker in item["question"]:
            return f"holds the template's own marker {marker!r}"
    return ""


def check_item_images(items: Sequence[VqaItem], path: str | Path, images: str | Path | None) -> list[str]:
    """The path of each item's image, after decoding all of them.

    Args:
        path: of the benchmark. images: folder that image paths are relative to; None is the
            benchmark's own.

    Raises:
        UserError: names the first items whose image is missing or corrupt.
    """
    folder, paths, problems = Path(images) if images else Path(path).parent, [], []
    for item in items:
        if not isinstance(item.get("image"), str):
            raise UserError(f"{path}: item {item['id']} has no image")
        image = resolve_image(item["image"], folder)
        try:
            load_rgb(image)
        except UserError as error:
            problems.append(f"{item['id']}: {error}")
        paths.append(image)
    if problems:
        examples = "; ".join(problems[:3])
        raise UserError(
            f"{path}: {len(problems)} items have no readable image: {examples}; fix them, or name the folder "
            "of the images",
            field="images",
        )
    return paths


def first_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The ids of words that are a single token each.

    Raises:
        UserError: a word is several tokens, so no token has its probability.
    """
    ids = []
    for word in words:
        tokens = tokenizer(word, add_special_tokens=False).input_ids
        if len(tokens) != 1:
            raise UserError(
                f"the tokenizer splits {word!r} into {len(tokens)} tokens; expected Phi-2's or the tiny one"
            )
        ids.append(tokens[0])
    return ids


class Answerer:
    """Answers questions about images in batches, by greedy decoding.

    Args:
        model: in evaluation mode, on its device. batch: questions at a time.

    Attributes:
        max_megapixels: larger images are refused.
    """

    max_megapixels = MEGAPIXELS

    def __init__(
        self, model: TinyLlavaForConditionalGeneration, processor: LlavaProcessor, *, batch: int = 8
    ) -> None:
        self._model, self._processor, self._batch = model.eval(), processor, batch
        self._image_tokens = image_tokens(model.config)
        self._end = processor.tokenizer.convert_tokens_to_ids(END)

    def _inputs(
        self, questions: Sequence[str], images: Sequence[str], prefix: str
    ) -> dict[str, torch.Tensor]:
        """Left-padded prompts; `prefix` is the beginning of the answer."""
        tokenizer = self._processor.tokenizer
        prefix_ids = tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []
        rows = []
        for question in questions:
            prompt = tokenize_turns(tokenizer, [(f"{IMAGE_PLACEHOLDER}\n{question}", "")], self._image_tokens)
            rows.append(
                torch.cat([torch.from_numpy(prompt.input_ids), torch.tensor(prefix_ids, dtype=torch.int64)])
            )
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self._end, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = row
            mask[index, longest - len(row) :] = 1
        pixel_values = torch.stack(
            [preprocess_image(self._processor, load_rgb(image, self.max_megapixels)) for image in images]
        )
        device = self._model.device
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "pixel_values": pixel_values.to(device, self._model.dtype),
        }

    @torch.inference_mode()
    def probabilities(
        self, questions: Sequence[str], images: Sequence[str], prefix: str = ""
    ) -> torch.Tensor:
        """Probabilities of the next token after "ASSISTANT:" and `prefix`: float32 [N, V] on the host."""
        logits = self._model(**self._inputs(questions, images, prefix), logits_to_keep=1).logits[:, -1]
        return logits.float().softmax(-1).cpu()

    @torch.inference_mode()
    def answers(self, questions: Sequence[str], images: Sequence[str], new_tokens: int) -> list[str]:
        """Greedy answers of one batch."""
        inputs = self._inputs(questions, images, "")
        ids = self._model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in self._processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        ]

    def p_fake(self, items: Sequence[VqaItem], images: Sequence[str]) -> list[float | None]:
        """P(fake) of each item of one kind, from the tokens that state the label.

        True/false: the first token, " Fake" and " fake" against " Real" and " real".
        Multiple choice: the letters, summed by their options' labels. Open: the token
        after " This is a". None if all these tokens have probability 0.
        """
        tokenizer, kind = self._processor.tokenizer, kind_of(items[0])
        prefix = VERDICT_START if kind == OPEN else ""
        probabilities = self.probabilities([str(item["question"]) for item in items], images, prefix)
        scores: list[float | None] = []
        for item, row in zip(items, probabilities, strict=True):
            if kind == MULTIPLE_CHOICE:
                words: dict[str, list[str]] = {"Fake": [], "Real": []}
                for letter, text in options_of(item).items():
                    label = label_in_text(text, first=True)
                    if label:
                        words[label].append(f" {letter}")
            else:
                words = {label: list(spellings) for label, spellings in _WORDS.items()}
            fake, real = (float(row[first_ids(tokenizer, words[key])].sum()) for key in ("Fake", "Real"))
            scores.append(fake / (fake + real) if fake + real > 0 else None)
        return scores

    def answer_all(self, items: Sequence[VqaItem], images: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield the items with `answer` and `p_fake`, a batch at a time, in order."""
        for start in range(0, len(items), self._batch):
            batch = items[start : start + self._batch]
            paths = images[start : start + self._batch]
            answers = self.answers([str(i["question"]) for i in batch], paths, NEW_TOKENS[kind_of(batch[0])])
            scores = self.p_fake(batch, paths)
            yield [
                {**item, "answer": answer, "p_fake": score}
                for item, answer, score in zip(batch, answers, scores, strict=True)
            ]


def sentence_similarity(folder: str | Path) -> Any:
    """Cosine similarity of mean-pooled sentence vectors, from a local encoder's folder.

    Returns:
        a function of (answers, truths) that returns a number in [-1, 1] for each pair.

    Raises:
        UserError: not an encoder that transformers can load.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"not a local sentence encoder ({one_line(error)[:200]})", field="encoder", value=folder
        ) from None

    @torch.inference_mode()
    def vectors(texts: list[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            inputs = tokenizer(text or " ", return_tensors="pt", truncation=True, max_length=512)
            hidden = encoder(**inputs).last_hidden_state[0]
            rows.append(hidden.mean(0))
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    def similarity(answers: list[str], truths: list[str]) -> list[float]:
        return (vectors(answers) * vectors(truths)).sum(-1).tolist()

    return similarity
