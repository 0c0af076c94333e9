"""Read and write TinyLLaVA's folders: the published checkpoint's names and Hugging Face's.

The published names differ from Hugging Face's (`RENAMED`). The names and shapes of a folder's
tensors are checked before a weight is read: transformers would load another model's folder
with a warning and random weights.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaConfig, LlavaProcessor, set_seed

from models.tinyllava.config import TINY
from models.tinyllava.model import (
    IMAGE_TOKEN_ID,
    PHI2,
    SIGLIP,
    TinyLlavaForConditionalGeneration,
    make_config,
    meta_model,
    tiny_config,
)
from models.tinyllava.text import END, IMAGE, load_tokenizer, make_processor, tiny_tokenizer

# Published name (a regular expression) to Hugging Face's; see `published_name` for the way back.
RENAMED = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^vision_tower\._vision_tower\.vision_model\.": "model.vision_tower.",
    r"^connector\._connector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^connector\._connector\.2\.": "model.multi_modal_projector.linear_2.",
}
HEAD = "model.vision_tower.head."  # SigLIP's pooling head: published but unused
HEAD_FILE = "unused_vision_head.safetensors"  # kept, so that an export is complete
SHARD_BYTES = "5GB"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name, file and shape."""

    name: str
    file: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFolder:
    """A folder that `load_tinyllava` can read.

    Attributes:
        folder: of the model. published: whether its tensors have the published names.
        config: Hugging Face's configuration of the model.
        unused: tensors of SigLIP's pooling head, by Hugging Face name.
    """

    folder: Path
    published: bool
    config: LlavaConfig
    unused: dict[str, StoredTensor]


def hf_name(published: str) -> str:
    """Hugging Face's name of a published tensor."""
    for pattern, name in RENAMED.items():
        published, count = re.subn(pattern, name, published)
        if count:
            break
    return published


def published_name(hf: str) -> str:
    """The inverse of `hf_name`."""
    for pattern, name in RENAMED.items():
        if hf.startswith(name):
            return pattern.removeprefix("^").replace("\\", "") + hf.removeprefix(name)
    return hf


def open_model_folder(folder: str | Path) -> ModelFolder:
    """Read a model folder's configuration and check its tensors' names and shapes.

    Raises:
        ValueError: no such folder, another architecture, or tensors that are missing,
            unexpected or of another shape; the message is one line and names them.
    """
    folder = Path(folder)
    values = _read_config(folder)
    kind = values.get("model_type")
    if kind == "tinyllava":
        config = _published_config(folder, values)
    elif kind == "llava" and values.get("text_config", {}).get("model_type") == "phi":
        config = LlavaConfig.from_dict(values)
    else:
        text = values.get("text_config", {}).get("model_type")
        raise ValueError(
            f"{folder}: its config.json has model_type {kind!r}{f' with {text!r}' if text else ''}, expected TinyLLaVA "
            "with Phi-2 ('tinyllava', or a 'llava' with 'phi' saved by telltale)"
        )
    published = kind == "tinyllava"
    tensors = {hf_name(t.name) if published else t.name: t for t in _list_tensors(folder)}
    unused = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    head = folder / HEAD_FILE
    if not published and head.is_file():
        unused = {tensor.name: tensor for tensor in _tensors_of(head)}
    _check_tensors(folder, config, {n: t for n, t in tensors.items() if not n.startswith(HEAD)})
    return ModelFolder(folder, published, config, unused)


def load_tinyllava(
    source: str | Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> tuple[TinyLlavaForConditionalGeneration, LlavaProcessor]:
    """Load the model, in evaluation mode, and its processor.

    Args:
        source: folder of the published checkpoint, or one that `save_tinyllava` or finetuning
            wrote, or "random:tiny" for a small model with random weights.
        dtype: of the weights. seed: of random weights.
        options: passed to `from_pretrained` (attn_implementation, quantization_config).

    Raises:
        ValueError: see `open_model_folder`.
    """
    if str(source) == TINY:
        set_seed(seed)
        tokenizer = tiny_tokenizer()
        config = tiny_config(
            len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.convert_tokens_to_ids(END)
        )
        model = TinyLlavaForConditionalGeneration(config).to(dtype).eval()
    else:
        opened = open_model_folder(source)
        tokenizer, config = load_tokenizer(opened.folder), opened.config
        model = TinyLlavaForConditionalGeneration.from_pretrained(
            opened.folder,
            config=config,
            key_mapping=RENAMED if opened.published else None,
            dtype=dtype,
            **options,
        )
        # transformers would reverse the renaming on every save, with wrong names under ZeRO-3.
        model._weight_conversions = []
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model, make_processor(tokenizer, config)


def save_tinyllava(
    model: TinyLlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: str | Path,
    unused: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder with Hugging Face's names: weights, configuration, tokenizer, processor.

    Args:
        unused: tensors of SigLIP's pooling head to keep (`read_unused_head`).
    """
    folder = Path(folder)
    model._weight_conversions = []
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    processor.save_pretrained(folder)
    if unused:
        save_file({name: t.contiguous() for name, t in unused.items()}, folder / HEAD_FILE)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    # The name that inference servers know. `lm_head_bias` in the same file says that
    # transformers' own class lacks the output layer's bias.
    values["architectures"] = ["LlavaForConditionalGeneration"]
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_unused_head(source: ModelFolder) -> dict[str, torch.Tensor]:
    """The tensors of SigLIP's pooling head in a model folder; empty if it has none."""
    tensors = {}
    for name, tensor in source.unused.items():
        with safe_open(tensor.file, "pt") as file:
            tensors[name] = file.get_tensor(tensor.name)
    return tensors


def write_published(folder: str | Path, output: str | Path) -> list[Path]:
    """Write a model folder with the published names, as TinyLLaVA_Factory reads them.

    Returns:
        the files written. Tensors keep their dtype. SigLIP's pooling head is written if the
        folder has it.

    Raises:
        ValueError: see `open_model_folder`. OSError: cannot be written.
    """
    source, output = open_model_folder(folder), Path(output)
    tensors = {}
    for tensor in _list_tensors(source.folder):
        with safe_open(tensor.file, "pt") as file:
            name = tensor.name if source.published else published_name(tensor.name)
            tensors[name] = file.get_tensor(tensor.name)
    tensors.update({published_name(name): tensor for name, tensor in read_unused_head(source).items()})
    output.mkdir(parents=True, exist_ok=True)
    written = _write_shards(tensors, output)
    values = _published_values(source.config, next(iter(tensors.values())).dtype)
    (output / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    load_tokenizer(source.folder).save_pretrained(output)
    return [*written, output / "config.json"]


def _write_shards(tensors: dict[str, torch.Tensor], output: Path) -> list[Path]:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for name, members in split.filename_to_tensors.items():
        save_file(
            {key: tensors[key].contiguous() for key in members}, output / name, metadata={"format": "pt"}
        )
    files = [output / name for name in split.filename_to_tensors]
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = output / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")
        files.append(path)
    return files


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a TinyLLaVA model or {TINY!r}")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: an adapter alone; use the merged model that training leaves in RUN/model"
        )
    try:
        values = json.loads((folder / "config.json").read_text())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: its config.json cannot be read ({reason})") from None
    return values


def _published_config(folder: Path, values: dict[str, Any]) -> LlavaConfig:
    text, vision = values.get("text_config", {}), values.get("vision_config", {})
    expected = {
        "connector_type": (values.get("connector_type"), "mlp2x_gelu"),
        "vision_feature_layer": (values.get("vision_feature_layer"), -2),
        "vision_feature_select_strategy": (values.get("vision_feature_select_strategy"), "patch"),
        "image_aspect_ratio": (values.get("image_aspect_ratio", "square"), "square"),
        "text_config.architectures": ((text.get("architectures") or ["PhiForCausalLM"])[0], "PhiForCausalLM"),
        "vision_config.model_type": (vision.get("model_type", "siglip_vision_model"), "siglip_vision_model"),
    }
    for key, (value, supported) in expected.items():
        if value != supported:
            raise ValueError(
                f"{folder}: its config.json has {key} {value!r}, expected {supported!r}; only TinyLLaVA with "
                "Phi-2 and SigLIP is supported"
            )
    chosen_text = {**PHI2, **{key: text[key] for key in PHI2 if text.get(key) is not None}}
    chosen_vision = {**SIGLIP, **{key: vision[key] for key in SIGLIP if vision.get(key) is not None}}
    tokenizer = load_tokenizer(folder)
    return make_config(chosen_text, chosen_vision, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE))


def _published_values(config: LlavaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as TinyLLaVA_Factory writes it (its configuration.py)."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    name = str(dtype).removeprefix("torch.")
    text_values = {key: text[key] for key in PHI2 if key in text}
    text_values["partial_rotary_factor"] = rope.get("partial_rotary_factor", PHI2["partial_rotary_factor"])
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "cache_dir": None,
        "connector_type": "mlp2x_gelu",
        "hidden_size": config.text_config.hidden_size,
        "ignore_index": -100,
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "llm_model_name_or_path": "microsoft/phi-2",
        "model_type": "tinyllava",
        "num_queries": 128,
        "num_resampler_layers": 3,
        "pad_token": END,
        "pad_token_id": config.pad_token_id,
        "resampler_hidden_size": 768,
        "text_config": {
            "_name_or_path": "microsoft/phi-2",
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            **text_values,
            "torch_dtype": name,
        },
        "tokenizer_model_max_length": 3072,
        "tokenizer_padding_side": "right",
        "tokenizer_use_fast": False,
        "torch_dtype": name,
        "tune_type_connector": "full",
        "tune_type_llm": "full",
        "tune_type_vision_tower": "frozen",
        "tune_vision_tower_from_layer": 0,
        "use_cache": True,
        "vision_config": {
            "model_name_or_path": "google/siglip-so400m-patch14-384",
            "model_type": "siglip_vision_model",
            **{key: vision[key] for key in SIGLIP},
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "vision_hidden_size": config.vision_config.hidden_size,
        "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
        "vision_model_name_or_path2": "",
        "vocab_size": config.text_config.vocab_size,
    }


def _list_tensors(folder: Path) -> list[StoredTensor]:
    """Names and shapes of all tensors of a folder, from the files' headers alone."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of weights ({error}); copy it again") from None
    else:
        names = ["model.safetensors"]
    tensors: list[StoredTensor] = []
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: missing; copy the model's files again (only safetensors are read)"
            )
        tensors += _tensors_of(folder / name)
    return tensors


def _tensors_of(path: Path) -> list[StoredTensor]:
    try:
        with safe_open(path, "pt") as file:
            return [StoredTensor(key, path, tuple(file.get_slice(key).get_shape())) for key in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        size = os.path.getsize(path)
        raise ValueError(f"{path}: damaged ({reason}; {size} bytes); copy it again") from None


def _check_tensors(folder: Path, config: LlavaConfig, stored: Mapping[str, StoredTensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    checks: list[tuple[str, list[str], Callable[[str], str]]] = [
        ("missing", sorted(shapes.keys() - stored.keys()), str),
        ("unexpected", sorted(stored.keys() - shapes.keys()), str),
        (
            "of another shape",
            sorted(n for n in shapes.keys() & stored.keys() if shapes[n] != stored[n].shape),
            lambda n: f"{n} {list(stored[n].shape)} for {list(shapes[n])}",
        ),
    ]
    problems = [
        f"{len(names)} {problem} ({_brief(list(map(show, names)))})"
        for problem, names, show in checks
        if names
    ]
    if problems:
        raise ValueError(
            f"{folder}: tensors do not fit TinyLLaVA: {'; '.join(problems)}; is it another model?"
        )


def _brief(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


__all__ = [
    "IMAGE_TOKEN_ID",
    "ModelFolder",
    "load_tinyllava",
    "open_model_folder",
    "save_tinyllava",
    "write_published",
]
