"""Benchmark cases of finetuning TinyLLaVA: our trainer beside Hugging Face's under upstream's recipe.

On a CPU the model is the small random one of the tests; on a GPU it has the published model's
shape (3.1 billion parameters) and random weights: time does not depend on their values.
"""

import json
import queue
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.vqa.conversations import read_conversations
from engines.benchmark.case import BenchmarkSettings, Group, Run, Unavailable
from engines.config.mlm import ConversationsConfig, FinetuneConfig, MlmOptimConfig, MlmTrainConfig, TuneConfig
from engines.mlm.dataset import Collator, ConversationDataset, tokenize_conversations
from engines.mlm.deepspeed_config import read_deepspeed
from engines.mlm.finetune import start_deepspeed
from engines.mlm.memory_estimate import check_memory
from engines.mlm.model import TORCH_DTYPES, apply_tuning, resolve_mlm_precision
from engines.mlm.passes import Passes
from engines.mlm.trainer import FinetuneTrainer
from engines.mlm.trainer_arguments import training_arguments
from engines.runtime.distributed import World
from engines.runtime.run_log import LogConfig
from models.tinyllava.checkpoint import load_tinyllava
from models.tinyllava.config import TINY
from models.tinyllava.model import PHI2, SIGLIP, TinyLlavaForConditionalGeneration, make_config
from models.tinyllava.text import IMAGE, MARKERS, TINY_WORDS, make_processor, tiny_tokenizer

_CONVERSATIONS = 256
_WORDS = (5, 250)  # of an answer, drawn evenly on a logarithmic scale: padding is part of the work
_NEVER = 10**9


def _config(settings: BenchmarkSettings, language: str, *, recompute: bool) -> FinetuneConfig:
    gpu = settings.device == "cuda"
    # 4 conversations at a time and 8 times over, as upstream's custom_finetune.sh on one GPU.
    return FinetuneConfig(
        data=ConversationsConfig(group_by_length=True, workers=settings.workers if gpu else 0),
        tune=TuneConfig(
            language=language,  # type: ignore[arg-type]
            lora_rank=128 if gpu else 8,
            lora_alpha=256 if gpu else 16,
        ),
        optim=MlmOptimConfig(lr=1e-5, schedule="constant", warmup=0.0),
        train=MlmTrainConfig(
            steps=_NEVER,
            global_batch=32 if gpu else 8,
            micro_batch=4,
            gradient_checkpointing=recompute,
            validate_every=_NEVER,
        ),
        log=LogConfig(wandb="off"),
    )


def write_conversations(folder: Path, images: Sequence[Path]) -> Path:
    """Draw conversations about these images, with answers of uneven length; the JSON file's path."""
    draw = random.Random(0)
    records = []
    for number in range(_CONVERSATIONS):
        words = round(_WORDS[0] * (_WORDS[1] / _WORDS[0]) ** draw.random())
        turns = [
            {"from": "human", "value": f"{IMAGE}\nIs this image real or fake?"},
            {"from": "gpt", "value": " ".join(draw.choices(TINY_WORDS, k=words))},
        ]
        image = str(images[number % len(images)])
        records.append({"id": str(number), "image": image, "conversations": turns})
    path = folder / "conversations.json"
    write_text(path, json.dumps(records))
    return path


def _model(config: FinetuneConfig, world: World, precision: str) -> tuple[Any, Any, Any]:
    """(model to train, processor, the whole model's configuration)."""
    if world.device.type == "cpu":
        model, processor = load_tinyllava(TINY, dtype=TORCH_DTYPES[precision])
        shape = model.config
    else:
        tokenizer = tiny_tokenizer()  # its 350 ids are among the published model's 51,200
        shape = make_config(PHI2, SIGLIP, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE))
        processor = make_processor(tokenizer, shape)
        torch.set_default_dtype(TORCH_DTYPES[precision])
        try:
            with world.device:
                model = TinyLlavaForConditionalGeneration(shape)
        finally:
            torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    return apply_tuning(model, config.tune), processor, shape


class PassCounter:
    """Counts what a trainer trains on, in its own process: worker processes make the batches.

    Args:
        trainer: its `training_step` counts from here on.
    """

    def __init__(self, trainer: Any) -> None:
        self._samples = self._places = 0
        # On the device: to look at it in every pass would make the host wait there.
        self._tokens: torch.Tensor | int = 0
        step = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
            mask = inputs["attention_mask"]
            self._samples += len(mask)
            self._places += mask.numel()
            self._tokens = self._tokens + mask.sum()
            return step(model, inputs, *rest, **named)

        trainer.training_step = counted

    def pop(self) -> tuple[int, int, int]:
        """Samples, tokens, and places with padding since the last call."""
        counts = (self._samples, int(self._tokens), self._places)
        self._samples = self._places = self._tokens = 0
        return counts


class _Pace(TrainerCallback):
    """Lets a trainer run for one window after the other, and counts what it trains on meanwhile."""

    counter: PassCounter  # once there is a trainer

    def __init__(self, settings: BenchmarkSettings) -> None:
        self._settings = settings
        self.go: queue.Queue[bool] = queue.Queue()
        self.reached: queue.Queue[Run | BaseException | None] = queue.Queue()

    def _open(self, control: Any) -> None:
        if not self.go.get():
            control.should_training_stop = True
        self.counter.pop()
        self._begin = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reached.put(None)
        self._open(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.perf_counter() - self._begin < self._settings.seconds:
            return
        if self._settings.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._begin
        samples, tokens, places = self.counter.pop()
        extra = {"tokens_per_second": tokens / seconds, "padding_share": 1 - tokens / places}
        if self._settings.device == "cuda":
            extra["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.reached.put(Run(samples, seconds, extra=extra))
        self._open(control)


@contextmanager
def _windows(trainer: Any, pace: _Pace, settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
    """The trainer's own loop, in a thread that stands still between runs."""

    def train() -> None:
        torch.set_num_threads(settings.workers if settings.device == "cpu" else 1)  # it is each thread's own
        try:
            trainer.train()
        except BaseException as error:
            pace.reached.put(error)

    def reached() -> Any:
        outcome = pace.reached.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def once() -> Run:
        pace.go.put(True)
        run: Run = reached()
        return run

    thread = threading.Thread(target=train)
    thread.start()
    try:
        reached()
        engine = type(trainer.model_wrapped).__name__
        if engine != "DeepSpeedEngine":
            raise RuntimeError(f"trained by {engine}, expected DeepSpeedEngine")
        yield once
    finally:
        pace.go.put(False)
        thread.join()


def _case(language: str, *, recompute: bool, plain: bool) -> Any:
    @contextmanager
    def case(settings: BenchmarkSettings) -> Iterator[Callable[[], Run]]:
        config = _config(settings, language, recompute=recompute)
        if settings.device == "cpu" and shutil.which("g++") is None:
            raise Unavailable("DeepSpeed compiles its operators for the CPU, and there is no g++")
        world = start_deepspeed()
        precision = resolve_mlm_precision("auto", world.device)
        zero = read_deepspeed("configs/deepspeed/zero2.json")
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            images = sorted((Path(settings.folder) / "large-files").resolve().glob("*.jpg"))
            samples, _ = read_conversations(write_conversations(Path(folder), images), None, MARKERS)
            train = config.train
            passes = Passes.of(train.global_batch, train.micro_batch, rank=0, world=1, loss=train.loss)
            arguments = training_arguments(config, Path(folder), zero, passes, precision, world, len(samples))
            model, processor, shape = _model(config, world, precision)
            tokenized, _ = tokenize_conversations(samples, processor, shape, config.data.max_length)
            data = ConversationDataset(tokenized, processor)
            try:
                check_memory(config, shape, zero, world, precision, int(data.lengths.max()))
            except UserError as error:
                raise Unavailable(str(error)) from None
            pace = _Pace(settings)
            given: dict[str, Any] = {
                "model": model,
                "args": arguments,
                "train_dataset": data,
                "data_collator": Collator(shape.pad_token_id, shape.vision_config.image_size),
                "callbacks": [pace],
            }
            if plain:
                _as_upstream(arguments)
                trainer = Trainer(**given)
            else:
                trainer = FinetuneTrainer(config, passes, **given)
            pace.counter = PassCounter(trainer)
            trainer.remove_callback(transformers.PrinterCallback)
            with _windows(trainer, pace, settings) as once:
                yield once

    return case


def _as_upstream(arguments: Any) -> None:
    """What TinyLLaVA_Factory's custom_finetune.sh says where our own arguments say something else.

    Conversations in random order, every activation recomputed, a look at the loss in every step;
    also under ZeRO-2, which it shares.
    """
    arguments.optim = "adamw_torch"
    arguments.logging_steps = 1
    assert arguments.activation_checkpointing


def _cases(language: str) -> dict[str, Any]:
    return {
        "telltale": _case(language, recompute=False, plain=False),
        "telltale, recomputing activations": _case(language, recompute=True, plain=False),
        "Hugging Face Trainer, upstream's recipe": _case(language, recompute=True, plain=True),
    }


lora = Group(
    "finetune",
    "TinyLLaVA under ZeRO-2, LoRA and the connector (CPU: a tiny random model; GPU: 3.1 B, bf16)",
    "samples",
    _cases("lora"),
    alone=True,
)
full = Group(
    "finetune-full",
    "the same, the whole language model and the connector",
    "samples",
    _cases("full"),
    alone=True,
)
GROUPS = {group.name: group for group in (lora, full)}
