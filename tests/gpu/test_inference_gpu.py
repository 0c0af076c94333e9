"""What needs a GPU: answers that are fetched late are those of a host that waits for each batch."""

import numpy as np
import pytest
import torch

from dataio.loading.loader import Loader
from dataio.loading.training_order import evaluation_specs
from dataio.shards.shard_set import ShardSet
from engines.checkpoint.load_model import load_model
from engines.evaluate.split_inference import forward, predict_share
from engines.runtime.distributed import World
from engines.runtime.inference import HostCopy, fetch_late
from engines.runtime.precision import resolve_precision
from tests.support import write_detector

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: run `pytest tests/gpu` on a machine with one"
)


def test_copies_hold_what_the_device_had_when_they_were_queued():
    def copies():
        values = torch.zeros(1 << 20, device="cuda")
        for number in range(8):
            values += 1
            yield HostCopy([values.mul(1.0), values[:1] * number])

    found = [(float(many.sum()) / (1 << 20), float(one)) for many, one in fetch_late(copies())]
    assert found == [(n + 1, (n + 1) * n) for n in range(8)]


def test_a_split_is_predicted_as_by_a_host_that_waits(tiny_shards, tmp_path):
    shards = ShardSet(tiny_shards, "train")
    labels = shards.labels
    path = write_detector(tmp_path / "best.pt", generators=labels.generators, objects=labels.objects)
    model, config, _ = load_model(path)
    config.data.deterministic = True
    device = torch.device("cuda", 0)
    world = World(rank=0, size=1, local_rank=0, device=device, distributed=False)
    ids, probabilities, _, _ = predict_share(model, config, shards, world, 16, False)
    expected = []
    precision = resolve_precision(config.train.precision, device)
    work = evaluation_specs(shards, config.data, batch=16, rank=0, world=1)
    with torch.inference_mode():
        for batch in Loader(shards, config.data, work, batch=16, device=device, train=False):
            torch.cuda.synchronize()
            expected.append(forward(model, batch.image, precision)[0].double().softmax(1).cpu().numpy())
    assert ids.tolist() == list(range(len(shards)))
    np.testing.assert_allclose(probabilities, np.concatenate(expected), atol=1e-3)
