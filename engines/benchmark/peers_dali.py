"""The plain DALI and PyTorch loop, as NVIDIA's examples write it, for the benchmark.

After DALI's ResNet-50 example (docs/examples/use_cases/pytorch/resnet50/main.py): a reader of files, a
decoder that cuts a random box, one normalizing operator, DALI's iterator for classification,
torchvision's network in channels-last under autocast, cross-entropy and SGD.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.benchmark.case import READY, BenchmarkSettings, Run, timed
from engines.benchmark.detector import detector_config, synchronize
from engines.benchmark.peers_input import MEAN, STD


def _batches(settings: BenchmarkSettings) -> Any:
    """DALI's own iterator over the loose files: dicts of images [N, 3, S, S] and labels [N, 1]."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

    config, gpu = detector_config(settings), settings.device == "cuda"
    folder = Path(settings.folder) / "large-files"
    labels = json.loads((folder / "labels.json").read_text())
    files = [str(folder / f"{number:06d}.jpg") for number in range(len(labels))]
    size = config.data.size

    @pipeline_def(
        batch_size=config.train.global_batch,
        num_threads=settings.workers,
        device_id=0 if gpu else None,
        prefetch_queue_depth=2,
        seed=0,
    )
    def pipeline() -> Any:
        encoded, label = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="Reader")
        image: Any = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            random_aspect_ratio=[0.75, 1.3333],
            random_area=list(config.data.scale),
            num_attempts=100,
        )
        image = fn.resize(image, resize_x=size, resize_y=size, interp_type=types.INTERP_TRIANGULAR)
        image = fn.crop_mirror_normalize(
            image,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="CHW",
            crop=(size, size),
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
        )
        label = fn.cast(label, dtype=types.INT64)
        return image, label.gpu() if gpu else label

    return DALIClassificationIterator(
        [pipeline()],
        reader_name="Reader",
        last_batch_policy=LastBatchPolicy.DROP,
        auto_reset=True,
    )


@contextmanager
def train_dali(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """DALI's iterator and the loop around torchvision's network."""
    import torchvision

    config, gpu = detector_config(settings), settings.device == "cuda"
    torch.manual_seed(0)
    torch.set_num_threads(config.train.threads)
    torch.backends.cudnn.benchmark = True
    model = torchvision.models.get_model(config.model.backbone, weights=None)
    model = model.to(settings.device, memory_format=torch.channels_last).train()
    loss_of = nn.CrossEntropyLoss().to(settings.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    loader = _batches(settings)
    batches = (batch for _ in itertools.count() for batch in loader)

    def work() -> int:
        batch = next(batches)[0]
        image = batch["data"].contiguous(memory_format=torch.channels_last)
        label = batch["label"].squeeze(-1).long()
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = loss_of(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(image)

    def once() -> Run:
        images, seconds = timed(work, settings.seconds, ready=READY)
        synchronize(settings)
        return Run(images, seconds, untimed=READY * config.train.global_batch)

    yield once
