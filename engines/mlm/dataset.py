"""From conversations to batches for the language model."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import LlavaConfig, LlavaProcessor

from dataio.core.errors import UserError
from dataio.vqa.conversations import Conversation, Rejected, open_image
from models.tinyllava.model import image_tokens
from models.tinyllava.text import IGNORE, Encoded, encode, pixels

_GROUPED_STEPS = 50  # steps whose conversations are sorted by length together


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations as tokens and pixels.

    Items: input_ids int64 [T], labels int64 [T] (-100 where not learnt), pixel_values
    float32 [3, S, S] or None.

    Attributes:
        lengths: int64 [N], tokens of each with its image's.
    """

    def __init__(
        self, samples: Sequence[Conversation], processor: LlavaProcessor, config: LlavaConfig
    ) -> None:
        self.samples, self._processor = list(samples), processor
        self._image_tokens = image_tokens(config)
        self.lengths = np.asarray([len(self._encode(sample).input_ids) for sample in self.samples], np.int64)

    def _encode(self, sample: Conversation) -> Encoded:
        return encode(self._processor.tokenizer, sample.turns, self._image_tokens)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        encoded = self._encode(sample)
        image = None
        if sample.image is not None:
            image = pixels(self._processor, open_image(sample.image))
        return {
            "input_ids": torch.from_numpy(encoded.input_ids),
            "labels": torch.from_numpy(encoded.labels),
            "pixel_values": image,
        }


class Collator:
    """Right-padded batches; one of text alone gets a black image that goes nowhere.

    Returns input_ids, labels, attention_mask int64 [N, T] and pixel_values float32
    [images or 1, 3, S, S].
    """

    def __init__(self, pad_id: int, image_size: int) -> None:
        self._pad_id, self._size = pad_id, image_size

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: int) -> torch.Tensor:
            rows = [item[name] for item in items]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        images = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
        if not images:
            images = [torch.zeros(3, self._size, self._size)]
        mask = [torch.ones(len(item["input_ids"]), dtype=torch.int64) for item in items]
        return {
            "input_ids": padded("input_ids", self._pad_id),
            "labels": padded("labels", IGNORE),
            # By length, not by id: the end token is the padding token, and is learnt.
            "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
            "pixel_values": torch.stack(images),
        }


class GlobalOrder(Sampler[int]):
    """The order of an epoch: a function of seed and epoch, whatever the number of processes.

    The tail that fills no global batch is dropped. With `lengths`, conversations of
    similar length share a global batch: they are sorted within windows of 50 steps, and
    the steps shuffled again.
    """

    def __init__(self, count: int, global_batch: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self._count, self._batch, self._seed, self._lengths = count, global_batch, seed, lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count // self._batch * self._batch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self.epoch])
        order = rng.permutation(self._count)[: len(self)]
        if self._lengths is not None:
            window = self._batch * _GROUPED_STEPS
            parts = [order[start : start + window] for start in range(0, len(order), window)]
            # Equal lengths stay in random order: the sort is stable.
            parts = [part[np.argsort(-self._lengths[part], kind="stable")] for part in parts]
            steps = np.concatenate(parts).reshape(-1, self._batch)
            order = steps[rng.permutation(len(steps))].reshape(-1)
        yield from (int(index) for index in order)


def split_off(
    samples: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation): by a hash of the image's name, so that one image is in one part."""
    limit = int(fraction * 2**32)

    def held(sample: Conversation) -> bool:
        name = f"{seed}:{(sample.image or sample.id).rpartition('/')[2]}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") < limit

    return [s for s in samples if not held(s)], [s for s in samples if held(s)]


def drop_long(
    samples: Sequence[Conversation], processor: LlavaProcessor, config: LlavaConfig, most: int
) -> tuple[list[Conversation], list[Rejected]]:
    """Leave out what is longer than `most` tokens: cut, it would lose its answer's end."""
    good, rejected = [], []
    for sample in samples:
        length = len(encode(processor.tokenizer, sample.turns, image_tokens(config)).input_ids)
        if length <= most:
            good.append(sample)
        else:
            rejected.append(Rejected(sample.id, f"{length} tokens, more than data.max_length {most}"))
    return good, rejected


def need_steps(count: int, global_batch: int, what: str) -> None:
    """Raise a UserError where there are fewer conversations than one step takes."""
    if count < global_batch:
        raise UserError(
            f"train.global_batch is {global_batch}, but {what} has {count} conversations; "
            "use a smaller one or more conversations"
        )
