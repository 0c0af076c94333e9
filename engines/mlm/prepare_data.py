"""What a finetuning run reads: conversations found, checked, and told of where they are bad."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import LlavaConfig, LlavaProcessor

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.vqa.conversations import Conversation, Rejected, check_images, read_conversations
from engines.config.mlm import FinetuneConfig
from engines.mlm.dataset import ConversationDataset, hold_out, require_one_step, tokenize_conversations
from engines.runtime.distributed import World, on_all_ranks, on_rank0
from models.tinyllava.text import MARKERS

_SHOWN = 5  # rejected samples that are named on the screen


def ensure_conversations(config: FinetuneConfig) -> None:
    """Draw the set a configuration asks for, where there is none yet."""
    wanted, target = config.data.generate, Path(config.data.conversations)
    if wanted.images == 0 or target.exists():
        return
    from dataio.sharding.quickstart import make_synthetic_shards
    from dataio.vqa.questions import VqaSizes, images_of_shards, write_vqa

    shards = target.parent / "shards"
    if not (shards / "manifest.json").is_file():
        print(f"drawing {wanted.images} synthetic images of {wanted.size} px into {shards}", flush=True)
        make_synthetic_shards(shards, images=wanted.images, size=wanted.size, seed=wanted.seed)
    images = {split: images_of_shards(shards, split) for split in ("train", "val", "test")}
    plan = VqaSizes(
        train=wanted.questions,
        val=wanted.val,
        true_false=wanted.benchmark,
        multiple_choice=wanted.benchmark,
        seed=wanted.seed,
    )
    write_vqa(images, target.parent, plan)


def read_samples(config: FinetuneConfig) -> tuple[list[Conversation], list[Conversation], list[Rejected]]:
    """(training, validation, rejected) samples of the files that `config.data` names."""
    data = config.data
    images = data.images or None
    samples, rejected = read_conversations(data.conversations, images, MARKERS)
    if data.val:
        held, more = read_conversations(data.val, images, MARKERS)
        rejected += more
    else:
        samples, held = hold_out(samples, data.val_fraction, config.run.seed)
    if data.check_images:
        samples, more = check_images(samples)
        rejected += more
        held, more = check_images(held)
        rejected += more
    return samples, held, rejected


def open_datasets(
    config: FinetuneConfig, world: World, folder: Path, processor: LlavaProcessor, shape: LlavaConfig
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """The training set, and the validation set if the configuration asks for one.

    Rank 0 reads and checks the files; every rank tokenizes each conversation once.

    Args:
        folder: of the run, for rejected.csv. shape: the model's configuration.

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


def report_rejected(rejected: Sequence[Rejected], config: FinetuneConfig, folder: Path) -> None:
    """List rejected samples in RUN/rejected.csv; stop unless told to go on without them."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id", "reason"])
    writer.writerows([sample.id, sample.reason] for sample in rejected)
    write_text(folder / "rejected.csv", text.getvalue())
    if not rejected:
        return
    told = "; ".join(f"{sample.id}: {sample.reason}" for sample in rejected[:_SHOWN])
    more = f"; all are in {folder / 'rejected.csv'}" if len(rejected) > _SHOWN else ""
    if not config.data.skip_rejected:
        raise UserError(
            f"{config.data.conversations}: {len(rejected)} unusable samples: {told}{more}; mend them, or go on "
            "without them with --data.skip_rejected true"
        )
    print(f"warning: going on without {len(rejected)} unusable samples: {told}{more}", file=sys.stderr)


def conversations_digest(samples: Sequence[Conversation]) -> str:
    """SHA-256 of what is learnt; images by the end of their names, since folders may move."""
    digest = hashlib.sha256()
    for sample in samples:
        name = (sample.image or "").rpartition("/")[2]
        digest.update(json.dumps([sample.id, name, sample.turns]).encode())
    return digest.hexdigest()
