"""The loader's thread on a GPU: the same batches, nobody's memory used again too early, and no waiting host."""

import time
from dataclasses import replace

import pytest
import torch

from dataio.loading.augment import AugmentConfig
from dataio.loading.config import DataConfig
from dataio.loading.dali_pipeline import as_images, build_pipeline, pipeline_inputs, run_pipeline
from dataio.loading.in_memory import InMemoryLoader, preload
from dataio.loading.loader import Loader
from dataio.loading.training_order import TrainingOrder, evaluation_specs, training_specs
from dataio.shards.shard_set import ShardSet

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: run `pytest tests/gpu` on a machine with one"
)

BATCH = 8
CONFIG = DataConfig(size=32, eval_crop=1.0, deterministic=True, prefetch=2)


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def shards(tiny_shards):
    return ShardSet(tiny_shards, "train")


def specs(shards):
    return evaluation_specs(shards, CONFIG, batch=BATCH, rank=0, world=1)


def opened(shards, device, **options):
    return Loader(shards, CONFIG, specs(shards), batch=BATCH, device=device, train=False, **options)


def expected(shards, device, half=False):
    """Each batch, waited for before the next is taken, float [N, 3, 32, 32] on the CPU."""

    def inputs():
        for work in specs(shards):
            yield pipeline_inputs(shards.read_many(work.ids), work.boxes, work.flips)

    config = replace(CONFIG, prefetch=1)
    pipeline = build_pipeline(
        inputs(), config, BATCH, device, resample=False, pad=False, augmented=False, half=half
    )
    return [as_images(run_pipeline(pipeline, None)).cpu() for _ in specs(shards)]


def late(seconds):
    """Keep the current stream busy, about."""
    torch.cuda._sleep(int(seconds * 1.5e9))


@pytest.mark.parametrize("half", [False, True])
def test_batches_are_the_synchronous_ones(shards, gpu, half):
    for batch, image in zip(opened(shards, gpu, half=half), expected(shards, gpu, half), strict=True):
        assert batch.image.dtype == (torch.float16 if half else torch.float32)
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.image.cpu(), image)
        rows = shards.rows[batch.sample_id.numpy()]
        assert batch.generator.tolist() == rows["generator"].tolist()
        assert batch.object_label.tolist() == rows["object"].tolist()


def test_half_precision_is_rounded_last(shards, gpu):
    for single, half in zip(expected(shards, gpu), expected(shards, gpu, half=True), strict=True):
        assert torch.equal(single.half(), half)


@pytest.mark.parametrize("side_stream", [False, True])
def test_a_late_consumer_finds_its_batches_as_they_were(shards, gpu, side_stream):
    stream = torch.cuda.Stream(gpu) if side_stream else torch.cuda.current_stream(gpu)
    copies = []
    with torch.cuda.stream(stream):
        for batch in opened(shards, gpu):
            late(0.02)
            copies.append((batch.image.clone(), batch.generator.clone()))
            del batch  # its memory may be used again only when the stream is here
    torch.cuda.synchronize()
    wanted = expected(shards, gpu)
    assert len(copies) == len(wanted)
    for (image, generator), work, pixels in zip(copies, specs(shards), wanted, strict=True):
        assert torch.equal(image.cpu(), pixels)
        assert generator.tolist() == shards.rows[work.ids]["generator"].tolist()


def test_held_batches_are_not_overwritten(shards, gpu):
    held = [batch.image for batch in opened(shards, gpu)]
    for image, pixels in zip(held, expected(shards, gpu), strict=True):
        assert torch.equal(image.cpu(), pixels)


def test_the_host_does_not_wait_for_the_device(shards, gpu):
    loader = opened(shards, gpu)
    for _ in range(4):
        next(loader)
    torch.cuda.synchronize()
    time.sleep(0.5)  # the thread is ahead again
    late(1.0)
    passed = torch.cuda.Event()
    passed.record()
    next(loader)
    assert not passed.query()
    next(loader)
    assert not passed.query()
    torch.cuda.synchronize()


def test_the_host_is_only_a_few_batches_ahead_of_the_device(shards, gpu):
    steps: list[torch.cuda.Event] = []
    for number, _ in enumerate(opened(shards, gpu)):
        if number > CONFIG.prefetch:
            assert steps[number - CONFIG.prefetch - 1].query()
        late(0.05)
        done = torch.cuda.Event()
        done.record()
        steps.append(done)
    torch.cuda.synchronize()


def test_a_graph_is_captured_while_a_loader_decodes(shards, gpu):
    value = torch.ones(64, 64, device=gpu)
    assert float((value @ value)[0, 0]) == 64  # cuBLAS takes its workspace
    loader = opened(shards, gpu)
    side = torch.cuda.Stream(gpu)
    taken = 0
    for _ in loader:
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream(gpu))
        # Not "global": calls of the loader's threads are none of this thread's business.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = value @ value
        graph.replay()
        assert float(result[0, 0]) == 64
        taken += 1
    assert taken == len(list(specs(shards)))


def test_small_images_are_decoded_to_the_cpus_pixels(shards, gpu):
    config = DataConfig(size=32, crop="random", pad=4, resident=True)
    on_gpu, on_cpu = (preload(config, device, shards)[0] for device in (gpu, torch.device("cpu")))
    assert torch.equal(on_gpu.pixels.cpu(), on_cpu.pixels)
    assert torch.equal(on_gpu.generator.cpu(), on_cpu.generator)


@pytest.mark.parametrize("half", [False, True])
def test_a_graph_gathers_held_batches_of_new_columns(shards, gpu, half):
    config = DataConfig(
        size=28, crop="random", pad=3, resident=True, augment=AugmentConfig(erase=0.5), window_shards=2
    )
    split = preload(config, gpu, shards)[0]
    work = list(
        training_specs(
            TrainingOrder(shards, config, 7, 16),
            micro_batch=16,
            rank=0,
            world=1,
            first_step=0,
            last_step=6,
        )
    )
    eager, replayed = (
        InMemoryLoader(shards, split, config, iter(work), device=gpu, train=True, half=half) for _ in range(2)
    )
    first = replayed.next_columns()
    assert first.is_pinned()
    buffer = first.to(gpu)
    side = torch.cuda.Stream(gpu)
    side.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(side):
        replayed.gather(buffer)
    torch.cuda.current_stream(gpu).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image, generator, object_label = replayed.gather(buffer)
    for number, batch in enumerate(eager):
        graph.replay()
        assert torch.equal(image, batch.image) and image.dtype == batch.image.dtype
        assert torch.equal(generator, batch.generator) and torch.equal(object_label, batch.object_label)
        if number + 1 < len(work):
            buffer.copy_(replayed.next_columns(), non_blocking=True)
