"""Load and validate the conversations of a finetuning run; report the rejected ones."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import LlavaConfig, LlavaProcessor

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.core.log import log
from dataio.vqa.conversations import Conversation, Rejected, check_images, read_conversations
from dataio.vqa.sample_text import escaped
from engines.config.mlm import FinetuneConfig
from engines.mlm.dataset import ConversationDataset, hold_out, require_one_step, tokenize_conversations
from engines.runtime.distributed import World, on_all_ranks, on_rank0
from models.tinyllava.text import MARKERS

_SHOWN = 5  # rejected samples named in the message


def draws_conversations(config: FinetuneConfig) -> bool:
    """Whether `ensure_conversations` would write them."""
    return config.data.generate.images > 0 and not Path(config.data.conversations).exists()


def ensure_conversations(config: FinetuneConfig) -> None:
    """Write the synthetic set that `data.generate` describes, unless `data.conversations` exists."""
    generate, target = config.data.generate, Path(config.data.conversations)
    if not draws_conversations(config):
        return
    from dataio.sharding.quickstart import make_synthetic_shards
    from dataio.vqa.questions import VqaSizes, images_of_shards, write_vqa

    shards = target.parent / "shards"
    if not (shards / "manifest.json").is_file():
        log.info(f"drawing {generate.images} synthetic images of {generate.size} px into {shards}")
        make_synthetic_shards(shards, images=generate.images, size=generate.size, seed=generate.seed)
    images = {split: images_of_shards(shards, split) for split in ("train", "val", "test")}
    sizes = VqaSizes(
        train=generate.questions,
        val=generate.val,
        true_false=generate.benchmark,
        multiple_choice=generate.benchmark,
        seed=generate.seed,
    )
    write_vqa(images, target.parent, sizes)


def read_samples(config: FinetuneConfig) -> tuple[list[Conversation], list[Conversation], list[Rejected]]:
    """(training, validation, rejected) samples of the files that `config.data` names."""
    data = config.data
    images = data.images or None
    samples, rejected = read_conversations(data.conversations, images, MARKERS)
    if data.val:
        held_out, rejected_val = read_conversations(data.val, images, MARKERS)
        rejected += rejected_val
    else:
        samples, held_out = hold_out(samples, data.val_fraction, config.run.seed)
    if data.check_images:
        samples, unreadable = check_images(samples)
        held_out, unreadable_val = check_images(held_out)
        rejected += [*unreadable, *unreadable_val]
    return samples, held_out, rejected


def open_datasets(
    config: FinetuneConfig, world: World, folder: Path | None, processor: LlavaProcessor, shape: LlavaConfig
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """The training set, and the validation set if the configuration asks for one.

    Rank 0 reads and checks the files; every rank tokenizes each conversation once.

    Args:
        folder: of the run, for rejected.csv; None writes none. shape: the model's configuration.

    Raises:
        UserError: on every rank: unreadable files, rejected samples, or fewer conversations
            than one global batch.
    """
    samples, held_out, rejected = on_rank0(world, lambda: read_samples(config))
    most = config.data.max_length
    train, long_train = tokenize_conversations(samples, processor, shape, most)
    val, long_val = tokenize_conversations(held_out, processor, shape, most)
    on_rank0(world, lambda: report_rejected([*rejected, *long_train, *long_val], config, folder))
    on_all_ranks(
        world, lambda: require_one_step(len(train), config.train.global_batch, config.data.conversations)
    )
    return ConversationDataset(train, processor), ConversationDataset(val, processor) if val else None


def report_rejected(rejected: Sequence[Rejected], config: FinetuneConfig, folder: Path | None) -> None:
    """List rejected samples in RUN/rejected.csv; nowhere where `folder` is None.

    Raises:
        UserError: there are some, and `data.skip_rejected` is false.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id", "reason"])
    rejected = [Rejected(escaped(sample.id), escaped(sample.reason)) for sample in rejected]
    writer.writerows([sample.id, sample.reason] for sample in rejected)
    if folder is not None:
        write_text(folder / "rejected.csv", text.getvalue())
    if not rejected:
        return
    reasons = "; ".join(f"{sample.id}: {sample.reason}" for sample in rejected[:_SHOWN])
    more = f"; all are in {folder / 'rejected.csv'}" if folder is not None and len(rejected) > _SHOWN else ""
    if not config.data.skip_rejected:
        raise UserError(
            f"{config.data.conversations}: {len(rejected)} unusable samples: {reasons}{more}; fix them, or leave "
            "them out with data.skip_rejected: true"
        )
    log.warning(f"leaving out {len(rejected)} unusable samples: {reasons}{more}")


def conversations_digest(samples: Sequence[Conversation]) -> str:
    """SHA-256 of the conversations; of an image only its file name counts, because folders move."""
    digest = hashlib.sha256()
    for sample in samples:
        name = (sample.image or "").rpartition("/")[2]
        digest.update(json.dumps([sample.id, name, sample.turns]).encode())
    return digest.hexdigest()
