"""Parts of a GPU check without training: decoding alone, evaluation and prediction."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from dataio.images.opening import quiet_pillow
from dataio.loading.loader import Batch, Loader
from dataio.loading.training_order import evaluation_specs
from dataio.shards.shard_set import ShardSet
from dataio.sources.inputs import Input
from engines.benchmark.case import READY, Run, timed
from engines.benchmark.cases_input import large_config, loading
from engines.benchmark.check_report import CheckTask, Reporter
from engines.benchmark.check_training import DEGRADATIONS
from engines.benchmark.detector import detector_config, synchronize, world_of
from engines.benchmark.harness import family_cpu_seconds
from engines.benchmark.memory import write_random_detector
from engines.config.values import to_dict
from engines.evaluate.split_inference import autocast, forward
from engines.predict.detector import Detector
from engines.predict.predict import predict
from engines.runtime.inference import HostCopy, fetch_late, inference_batch
from engines.runtime.precision import resolve_precision
from models.detector.dual_head import DualHead

_AHEAD = 2  # batches that `fetch_late` has queued


def _windows(once: Callable[[], Run], repeats: int) -> tuple[float, float]:
    """Median images/s of some windows after a cold one, and the host's cores meanwhile."""
    once()
    begin, cpu = time.perf_counter(), family_cpu_seconds()
    rates = [run.images / run.seconds for run in (once() for _ in range(repeats))]
    return statistics.median(rates), (family_cpu_seconds() - cpu) / (time.perf_counter() - begin)


def measure_decoding(task: CheckTask, report: Reporter) -> None:
    """Decoding and augmenting alone, by the hardware's decoder, as configured, and with degradations."""
    settings = task.settings
    plain = large_config(0 if settings.device == "cuda" else settings.workers + 1)
    variants = {
        "hardware decoder": replace(plain, hw_decoder_load=1.0),
        "as configured": plain,
        "degraded": replace(plain, hw_decoder_load=1.0, augment=DEGRADATIONS),
    }
    rates: dict[str, float] = {}
    for name, config in variants.items():
        with report.attempt(name), loading(settings, "large", config) as once:
            rates[name], cores = _windows(once, task.repeats)
            report.figure(name, rates[name], "img/s", cores=cores, hw_decoder_load=config.hw_decoder_load)
            if name == "hardware decoder":
                report.figure("cores", cores, "cores")
    if "degraded" in rates and "hardware decoder" in rates:
        report.figure("degraded, share of plain", rates["degraded"] / rates["hardware decoder"], "")


def measure_inference(task: CheckTask, report: Reporter) -> None:
    """Evaluation and prediction of images without end, beside what each of them waits for."""
    with report.attempt("evaluation"):
        _evaluation(task, report)
    with report.attempt("prediction"):
        _prediction(task, report)


def _repeated(task: CheckTask, work: Callable[[], int], ready: int = READY) -> float:
    """Median images/s; `ready` calls before each window, as many as were prepared in advance."""

    def once() -> Run:
        images, seconds = timed(work, task.settings.seconds, ready=ready)
        synchronize(task.settings)
        return Run(images, seconds)

    return _windows(once, task.repeats)[0]


@torch.inference_mode()
def _evaluation(task: CheckTask, report: Reporter) -> None:
    """As `predict_share`, of a split that does not end: a small split is over before the pipeline is warm."""
    settings = task.settings
    config, world = detector_config(settings), world_of(settings)
    torch.set_num_threads(config.train.threads)
    shards = ShardSet(config.data.shards, "train")
    model = DualHead(config.model, shards.labels.generators, shards.labels.objects).eval()
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = resolve_precision(config.train.precision, world.device)
    batch = inference_batch(config.data.size, 4 * config.train.micro_batch, world.device)

    def batches() -> Iterator[Batch]:
        passes = (
            evaluation_specs(shards, config.data, batch=batch, rank=0, world=1) for _ in itertools.count()
        )
        work = itertools.chain.from_iterable(passes)
        return iter(Loader(shards, config.data, work, batch=batch, device=world.device, train=False))

    loaded = batches()
    loader = _repeated(task, lambda: len(next(loaded).image))
    report.figure("evaluation: loader alone", loader, "img/s")
    image = next(loaded).image.clone()

    def answers(images: Iterator[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        return fetch_late(
            HostCopy([head.double().softmax(1) for head in forward(model, image, precision)])
            for image in images
        )

    with autocast(world.device, precision):
        computed = answers(itertools.repeat(image))
        alone = _repeated(task, lambda: len(next(computed)[0]), ready=_AHEAD)
        report.figure("evaluation: model alone", alone, "img/s")
        both = answers(each.image for each in batches())
        rate = _repeated(task, lambda: len(next(both)[0]))
    report.figure("evaluation", rate, "img/s", batch=batch)
    report.figure("evaluation beside the slower", rate / min(loader, alone), "")


def _prediction(task: CheckTask, report: Reporter) -> None:
    """Loose files through `telltale predict`'s path; its codec makes and stores a JPEG of each on the host."""
    settings = task.settings
    config = to_dict(detector_config(settings))
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        path = Path(folder) / "random.pt"
        write_random_detector(path, {"model": config["model"], "data": config["data"]})
        detector = Detector(path)
    files = sorted((Path(settings.folder) / "large-files").glob("*.jpg"))
    inputs = [Input(str(file), file.read_bytes) for file in files]
    sources = [file.read_bytes() for file in files[: detector.batch]]
    encoded = [detector.prepare(source) for source in sources]
    with quiet_pillow(), ThreadPoolExecutor(settings.workers) as pool:
        codec = _repeated(task, lambda: len(list(pool.map(detector.prepare, sources))), ready=1)
    report.figure("prediction: codec alone", codec, "img/s", threads=settings.workers)

    def known() -> int:
        detector.predict(encoded)
        return len(encoded)

    alone = _repeated(task, known, ready=1)
    report.figure("prediction: decoding and model alone", alone, "img/s")
    rows = predict(detector, itertools.cycle(inputs), workers=settings.workers)

    def work() -> int:
        for row in itertools.islice(rows, detector.batch):
            if row.error:
                raise RuntimeError(f"{row.path}: {row.error}")
        return detector.batch

    rate = _repeated(task, work)
    report.figure("prediction", rate, "img/s", batch=detector.batch)
    report.figure("prediction beside the slower", rate / min(codec, alone), "")
