"""From conversations to batches of tokens and pixels."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import LlavaConfig, LlavaProcessor

from dataio.core.errors import UserError
from dataio.vqa.conversations import Conversation, Rejected, load_rgb
from models.tinyllava.model import image_tokens
from models.tinyllava.text import IGNORE, TokenizedTurns, preprocess_image, tokenize_turns

_GROUPED_STEPS = 50  # conversations are sorted by length within so many steps


@dataclass(frozen=True)
class TokenizedConversation:
    """One sample with its tokens."""

    sample: Conversation
    tokens: TokenizedTurns


def tokenize_conversations(
    samples: Sequence[Conversation], processor: LlavaProcessor, config: LlavaConfig, max_length: int
) -> tuple[list[TokenizedConversation], list[Rejected]]:
    """Tokenize each conversation, once for the whole run.

    Args:
        max_length: tokens, with the image's. Longer conversations are rejected, because a
            truncated one would lose the end of its answer.

    Returns:
        the good samples, in order; the rejected ones.
    """
    good, rejected = [], []
    for sample in samples:
        tokens = tokenize_turns(processor.tokenizer, sample.turns, image_tokens(config))
        if len(tokens) <= max_length:
            good.append(TokenizedConversation(sample, tokens))
        else:
            reason = f"{len(tokens)} tokens, more than data.max_length {max_length}"
            rejected.append(Rejected(sample.id, reason))
    return good, rejected


class ConversationDataset(Dataset[dict[str, Any]]):
    """Tokenized conversations with their images.

    Items: input_ids int64 [T], labels int64 [T] (-100 where not learned), pixel_values
    float32 [3, S, S] or None. Item ~i is conversation i with all labels -100.

    Attributes:
        conversations: the N samples.
        lengths: int64 [N], tokens of each conversation with its image's.
    """

    def __init__(self, conversations: Sequence[TokenizedConversation], processor: LlavaProcessor) -> None:
        self.conversations, self._processor = list(conversations), processor
        self.lengths = np.asarray([len(conversation.tokens) for conversation in self.conversations], np.int64)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ignored = index < 0
        conversation = self.conversations[~index if ignored else index]
        image, tokens = conversation.sample.image, conversation.tokens
        labels = torch.from_numpy(tokens.labels)
        return {
            "input_ids": torch.from_numpy(tokens.input_ids),
            "labels": torch.full_like(labels, IGNORE) if ignored else labels,
            "pixel_values": None if image is None else preprocess_image(self._processor, load_rgb(image)),
        }


class Collator:
    """Right-padded batches.

    A batch of text alone gets a black image whose features are not used, so that every rank runs
    the same modules.

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
            # By length, not by id: the end token is also the padding token, and is learned.
            "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
            "pixel_values": torch.stack(images),
        }


class GlobalOrder(Sampler[int]):
    """The order of an epoch: a function of seed and epoch, not of the number of processes.

    The incomplete last global batch is dropped. With `lengths`, conversations of similar length
    share a global batch: they are sorted within windows of 50 steps, then the steps are shuffled.
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


def hold_out(
    samples: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation) samples, split by a hash of the image's name: an image is in one part."""
    limit = int(fraction * 2**32)

    def is_held_out(sample: Conversation) -> bool:
        name = f"{seed}:{(sample.image or sample.id).rpartition('/')[2]}"
        return (
            int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:4], "little") < limit
        )

    return [s for s in samples if not is_held_out(s)], [s for s in samples if is_held_out(s)]


def require_one_step(count: int, global_batch: int, source: str) -> None:
    """Raise a UserError if there are fewer conversations than a global batch."""
    if count < global_batch:
        raise UserError(
            f"train.global_batch is {global_batch}, but {source} has {count} conversations; "
            "use a smaller global batch or more conversations"
        )
