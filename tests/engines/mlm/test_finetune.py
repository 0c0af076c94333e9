"""The parts of a finetuning run: order, batches, what learns, memory, DeepSpeed's file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.core.errors import UserError
from dataio.vqa.conversations import Conversation
from engines.config.mlm import FinetuneConfig, TuneConfig
from engines.config.parser import parse_as
from engines.mlm import deepspeed_config as zero
from engines.mlm.dataset import (
    Collator,
    ConversationDataset,
    GlobalOrder,
    hold_out,
    require_one_step,
    tokenize_conversations,
)
from engines.mlm.memory_estimate import (
    GIB,
    check_memory,
    estimate_memory,
    flops_per_token,
    learned_parameters,
    lora_parameters,
)
from engines.mlm.model import (
    apply_tuning,
    load_model_to_tune,
    mlm_parameter_groups,
    resolve_mlm_precision,
    set_dropout,
)
from engines.mlm.output import result_names
from engines.runtime.distributed import World
from launch.finetune_memory import main
from models.tinyllava.checkpoint import load_tinyllava, save_tinyllava
from models.tinyllava.config import TINY
from models.tinyllava.model import PHI2, SIGLIP, make_config, part_of
from models.tinyllava.text import IGNORE

PUBLISHED = make_config(PHI2, SIGLIP, image_token_id=50295)
GPU = World(0, 1, 0, torch.device("cpu"), False)


def config(repo_root, *flags):
    return parse_as(FinetuneConfig, list(flags), repo_root / "configs" / "tinyllava_quickstart.yaml")


def test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = GlobalOrder(50, 8, seed=3)
    first = list(order)
    assert len(first) == len(order) == 48
    assert len(set(first)) == 48
    assert list(GlobalOrder(50, 8, seed=3)) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(GlobalOrder(50, 8, seed=4)) != first


def test_grouping_by_length_wastes_less_and_still_shuffles():
    lengths = np.random.default_rng(0).integers(10, 500, 400)
    plain, grouped = (list(GlobalOrder(400, 8, 1, given)) for given in (None, lengths))
    assert sorted(grouped) == sorted(plain) == list(range(400))

    def waste(order):
        steps = lengths[np.asarray(order)].reshape(-1, 8)
        return float((steps.max(1, keepdims=True) - steps).mean())

    assert waste(grouped) < 0.1 * waste(plain)
    means = lengths[np.asarray(grouped)].reshape(-1, 8).mean(1)
    assert (np.diff(means) > 0).any() and (np.diff(means) < 0).any()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    Image.effect_noise((20, 20), 50).save(folder / "a.png")
    return [
        Conversation("image", str(folder / "a.png"), (("<image>\nReal?", "Fake."),)),
        Conversation("text", None, (("What is a camera? Tell me at length, please.", "A box."),)),
    ]


def dataset(samples, processor, config):
    good, rejected = tokenize_conversations(samples, processor, config, 3072)
    assert rejected == []
    return ConversationDataset(good, processor)


def test_each_conversation_is_tokenized_once(samples, monkeypatch):
    model, processor = load_tinyllava(TINY)
    tokenizer, texts = type(processor.tokenizer), []
    call = tokenizer.__call__

    def counted(self, text, **options):
        texts.append(text)
        return call(self, text, **options)

    monkeypatch.setattr(tokenizer, "__call__", counted)
    data = dataset(samples, processor, model.config)
    for _ in range(3):  # epochs
        assert [len(data[0]["input_ids"]), len(data[1]["input_ids"])] == data.lengths.tolist()
    assert len(texts) == len(set(texts)) == len(samples)


def test_batches_are_padded_by_length_and_text_alone_gets_a_black_image(samples):
    model, processor = load_tinyllava(TINY)
    data = dataset(samples, processor, model.config)
    collate = Collator(model.config.pad_token_id, 56)
    both = collate([data[0], data[1]])
    assert both["pixel_values"].shape == (1, 3, 56, 56)
    assert both["attention_mask"].sum(1).tolist() == data.lengths.tolist()
    end = model.config.eos_token_id
    for row, length in enumerate(data.lengths):
        # The end token is the padding token: inside it is learnt, behind it is not.
        assert both["labels"][row, length - 1] == both["input_ids"][row, length - 1] == end
        assert (both["labels"][row, length:] == IGNORE).all()
        assert (both["input_ids"][row, length:] == end).all()
    alone = collate([data[1]])
    assert alone["pixel_values"].shape == (1, 3, 56, 56)
    assert alone["pixel_values"].abs().max() == 0


def test_long_conversations_are_rejected_by_name(samples):
    model, processor = load_tinyllava(TINY)
    lengths = dataset(samples, processor, model.config).lengths.tolist()
    good, rejected = tokenize_conversations(samples, processor, model.config, min(lengths))
    longer = samples[lengths.index(max(lengths))].id
    assert [one.sample.id for one in good] == [one.id for one in samples if one.id != longer]
    assert [one.id for one in rejected] == [longer]
    assert rejected[0].reason == f"{max(lengths)} tokens, more than data.max_length {min(lengths)}"
    with pytest.raises(UserError, match=r"train\.global_batch is 8, but set has 2 conversations"):
        require_one_step(2, 8, "set")


def test_splitting_off_keeps_an_images_conversations_together():
    many = [Conversation(str(n), f"/a/{n // 3}.jpg", (("<image>\nx", "y"),)) for n in range(600)]
    train, held = hold_out(many, 0.2, seed=0)
    assert len(train) + len(held) == 600
    assert 60 < len(held) < 180
    assert not {one.image for one in train} & {one.image for one in held}
    assert hold_out(many, 0.0, seed=0)[1] == []


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({"language": "full"}, {"language", "connector"}),
        ({"language": "frozen"}, {"connector"}),
        ({"language": "frozen", "vision": "full", "connector": False}, {"vision"}),
        ({"language": "lora", "lora_rank": 2}, {"language", "connector"}),
        ({"language": "dora", "lora_rank": 2, "connector": False}, {"language"}),
        (
            {"language": "full", "vision": "partial", "vision_from_layer": 1},
            {"language", "connector", "vision"},
        ),
    ],
    ids=["full", "connector", "tower", "lora", "dora", "partial"],
)
def test_what_learns(changes, learns):
    settings = TuneConfig(**changes)
    model, _ = load_tinyllava(TINY)
    names = [n for n, p in apply_tuning(model, settings).named_parameters() if p.requires_grad]
    assert {part_of(name) for name in names} == learns
    if settings.adapters:
        of_language = [name for name in names if part_of(name) == "language"]
        assert all(".lora_" in name for name in of_language)
        targets = {name.split(".lora_")[0] for name in of_language}
        assert len(targets) == 2 * 6  # layers x linear layers
        assert not any("lm_head" in name for name in targets)
    if settings.vision == "partial":
        assert not any("encoder.layers.0." in name for name in names)
        # The last layer's output is not used, so that its gradient would be none.
        assert not any("encoder.layers.3." in name or "post_layernorm" in name for name in names)


def test_adapters_of_a_weights_folder_start_from_the_runs_seed(repo_root, tmp_path):
    model, processor = load_tinyllava(TINY)
    save_tinyllava(model, processor, tmp_path)

    def start(seed):
        words = ("--tune.language", "lora", "--model.weights", str(tmp_path), "--run.seed", str(seed))
        tuned = load_model_to_tune(config(repo_root, *words), "fp32", torch.device("cpu"))
        return torch.cat([p.flatten() for n, p in tuned.named_parameters() if "lora_A" in n])

    first = start(0)
    torch.rand(7)  # what was drawn before does not matter
    assert torch.equal(start(0), first)
    assert not torch.equal(start(1), first)


def test_what_learns_gets_a_gradient():
    model, processor = load_tinyllava(TINY)
    model = apply_tuning(model, TuneConfig(language="full", vision="full"))
    samples = [Conversation("a", None, (("Is it?", "Yes."),))]
    batch = Collator(0, 56)([dataset(samples, processor, model.config)[0]])
    model(**batch).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_first_layer_behind_the_last_used_one_is_refused():
    model, _ = load_tinyllava(TINY)
    with pytest.raises(UserError, match=r"tune\.vision_from_layer is 3, .* use 2 or less"):
        apply_tuning(model, TuneConfig(vision="partial", vision_from_layer=3))


def test_each_part_has_its_rate_and_norms_have_no_decay(repo_root):
    settings = config(
        repo_root, "--optim.lr", "1e-3", "--optim.connector_lr", "2e-3", "--optim.vision_lr", "3e-3"
    )
    optim = replace(settings.optim, weight_decay=0.1)
    model, _ = load_tinyllava(TINY)
    model = apply_tuning(model, TuneConfig(language="full", vision="full"))
    groups = mlm_parameter_groups(model, optim)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(learnt)
    expected = {"language": 1e-3, "connector": 2e-3, "vision": 3e-3}
    for name, parameter in learnt.items():
        assert rates[id(parameter)] == (expected[part_of(name)], 0.1 if parameter.dim() > 1 else 0.0), name


def test_dropout_reaches_the_layers():
    model, processor = load_tinyllava(TINY)
    ids = torch.from_numpy(np.asarray(processor.tokenizer("Is this real?").input_ids))[None]
    image = torch.zeros(1, 3, 56, 56)
    set_dropout(model, 0.5)
    model.train()
    assert not torch.equal(*(model(input_ids=ids, pixel_values=image).logits for _ in range(2)))
    set_dropout(model, 0.0)
    assert torch.equal(*(model(input_ids=ids, pixel_values=image).logits for _ in range(2)))


def test_fp16_is_refused_on_a_cpu():
    assert resolve_mlm_precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(UserError, match=r"model\.precision is fp16"):
        resolve_mlm_precision("fp16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": "auto"}},
            "is a key of ZeRO-3, but the stage is 2",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            "offload_param is a key of ZeRO-3",
        ),
        ({"zero_optimization": {"stage": 0}}, "stage is 0, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save must be true"),
        ({"zero_optimization": {}}, "not a DeepSpeed file"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is set, but the experiment's configuration decides"),
        ({"train_batch_size": 7}, "train_batch_size is set"),
    ],
)
def test_deepspeed_files_are_checked(tmp_path, repo_root, changes, said):
    good = json.loads((repo_root / "configs" / "deepspeed" / "zero2.json").read_text())
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**good, **changes}))
    with pytest.raises(UserError, match=said):
        zero.read_deepspeed(str(file))


def test_our_deepspeed_files_are_good(repo_root, tmp_path):
    for file in (repo_root / "configs" / "deepspeed").glob("*.json"):
        settings = zero.read_deepspeed(f"configs/deepspeed/{file.name}")
        assert str(zero.stage_of(settings)) in file.name
        assert zero.offloads(settings) == ("offload" in file.name)
        assert settings["zero_optimization"]["overlap_comm"] is False
    with pytest.raises(UserError, match="no such file"):
        zero.read_deepspeed(str(tmp_path / "none.json"))


def test_adapters_of_the_published_model():
    """The facts' 192 modules at rank 128: 188,743,680 parameters."""
    assert lora_parameters(PUBLISHED, 128) == 188_743_680
    model, _ = load_tinyllava(TINY)
    wrapped = apply_tuning(model, TuneConfig(language="lora", lora_rank=4, connector=False))
    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert lora_parameters(wrapped.config, 4) == counted
    full = apply_tuning(load_tinyllava(TINY)[0], TuneConfig(language="full", vision="full"))
    counted = sum(p.numel() for p in full.parameters() if p.requires_grad)
    # Embeddings are spread over the tower's layers in the estimate.
    assert sum(
        learned_parameters(full.config, TuneConfig(language="full", vision="full")).values()
    ) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "world", "language", "states"),
    [
        (2, 1, "full", 45.5),
        (2, 4, "full", 16.2),
        (3, 4, "full", 11.4),
        (3, 8, "full", 5.7),
        (2, 1, "lora", 9.6),
        (2, 8, "lora", 7.1),
    ],
)
def test_model_states_are_those_of_the_arithmetic(repo_root, stage, world, language, states):
    """2 bytes of weights and gradients, 12 of the optimiser: GB as in ZeRO's paper, without buffers."""
    settings = config(repo_root, "--tune.language", language, "--tune.vision", "frozen")
    found = estimate_memory(
        PUBLISHED,
        settings,
        {"zero_optimization": {"stage": stage}},
        length=900,
        world=world,
        precision="bf16",
    )
    assert (found.weights + found.gradients + found.optimizer) / 1e9 == pytest.approx(states, abs=0.3)


def test_a_gpu_too_small_is_told_what_would_fit(repo_root):
    settings = config(repo_root, "--tune.language", "full", "--train.micro_batch", "8")
    two = zero.read_deepspeed("configs/deepspeed/zero2.json")
    check_memory(settings, PUBLISHED, two, GPU, "bf16", 900, available=140 * GIB)
    with pytest.raises(
        UserError, match=r"GiB of memory are needed .* 24\.0 GiB are free: these would fit: .*lora"
    ):
        check_memory(settings, PUBLISHED, two, GPU, "bf16", 900, available=24 * GIB)
    with pytest.raises(UserError, match="no setting fits"):
        check_memory(settings, PUBLISHED, two, GPU, "bf16", 900, available=2 * GIB)
    relaxed = replace(settings, train=replace(settings.train, memory_check=False))
    check_memory(relaxed, PUBLISHED, two, GPU, "bf16", 900, available=GIB)
    check_memory(settings, PUBLISHED, two, GPU, "bf16", 900)  # a CPU is not asked


def test_estimates_grow_as_they_should(repo_root):
    base = config(repo_root, "--tune.language", "full", "--train.micro_batch", "4")
    two = {"zero_optimization": {"stage": 2}}

    def total(settings=base, zeroed=two, length=900, world=1):
        return estimate_memory(
            PUBLISHED, settings, zeroed, length=length, world=world, precision="bf16"
        ).total

    assert total(length=1800) > total()
    assert total(world=4) < total()
    assert total(zeroed={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}) < total()
    checkpointed = replace(base, train=replace(base.train, gradient_checkpointing=True))
    assert total(checkpointed) < total()
    rank = [replace(base, tune=replace(base.tune, language="lora", lora_rank=r)) for r in (8, 256)]
    assert total(rank[0]) < total(rank[1]) < total()


def test_flops_of_a_token():
    full = flops_per_token(PUBLISHED, TuneConfig(language="full"))
    # 6 N of the language model (without its embedding), 2 N of the frozen tower's patches.
    expected = 6 * (2_779_683_840 - 51200 * 2560) + 6 * 9_507_840 + 2 * 412_987_248 * 729 / 728
    assert full == pytest.approx(expected)
    assert flops_per_token(PUBLISHED, TuneConfig(language="lora")) < full


def test_results_of_benchmarks_with_one_name_do_not_overwrite_each_other():
    assert result_names(["a/true_false.json", "b/choice.json"]) == ["true_false", "choice"]
    assert result_names(["x/a/q.json", "x/b/q.json", "q2.json"])[:2] == ["a_q", "b_q"]
    assert result_names(["a_q/q.json", "b_q/q.json"]) == ["a_q_q", "b_q_q"]
    assert result_names([]) == []


def test_the_memory_table_has_every_stage_and_number_of_gpus(repo_root, capsys):
    assert main(["--config", str(repo_root / "configs/tinyllava_full_zero3.yaml"), "--gpus", "1,8"]) == 0
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert "2,789,191,680 parameters learn; bf16, micro-batch 4" in first
    assert [row.split()[0] for row in rows] == [
        "zero1",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
    ]
    # 16 bytes for each of the 2.79 billion that learn, 2 for the frozen tower: 45.4 GB.
    assert [row.split()[2] for row in rows if "offload" not in row] == ["(42.3)"] * 3
    for words in (["--gpus", "0"], ["--gpus", "two"], ["--length", "0"]):
        with pytest.raises(UserError, match=words[0]):
            main(words)
