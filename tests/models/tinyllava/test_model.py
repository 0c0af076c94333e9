"""The model against an independent restatement of TinyLLaVA, and its folders."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PhiConfig, PhiForCausalLM, SiglipVisionConfig, SiglipVisionModel

from models.tinyllava.checkpoint import (
    HEAD,
    hf_name,
    load_tinyllava,
    open_model_folder,
    published_name,
    read_unused_head,
    save_tinyllava,
    write_published,
)
from models.tinyllava.config import TINY
from models.tinyllava.model import PHI2, SIGLIP, count_parameters, image_tokens, make_config
from models.tinyllava.text import END, IGNORE, IMAGE, preprocess_image, tokenize_turns

TURNS = [("<image>\nIs this image real or fake?", "This is a fake image.")]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small random checkpoint with the published names, SigLIP's unused head included."""
    folder = tmp_path_factory.mktemp("published")
    model, processor = load_tinyllava(TINY, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)  # biases and norms too, so that none can be dropped unseen
    head = {f"{HEAD}probe": torch.randn(1, 1, 48), f"{HEAD}layernorm.weight": torch.randn(48)}
    save_tinyllava(model, processor, folder / "ours", head)
    write_published(folder / "ours", folder / "published")
    return folder / "published"


class Restated(nn.Module):
    """TinyLLaVA_Factory's forward pass in plain steps: tower, connector, splice, Phi."""

    def __init__(self, folder):
        super().__init__()
        values = json.loads((folder / "config.json").read_text())
        text, vision = dict(values["text_config"]), dict(values["vision_config"])
        for name in ("_name_or_path", "architectures", "model_type", "torch_dtype"):
            text.pop(name)
        for name in ("model_name_or_path", "model_type"):
            vision.pop(name)
        self.phi = PhiForCausalLM(PhiConfig(**text))
        self.tower = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False))
        hidden = values["hidden_size"]
        self.connector = nn.Sequential(
            nn.Linear(values["vision_hidden_size"], hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        tensors = load_file(folder / "model.safetensors")
        parts = {"language_model.": self.phi, "connector._connector.": self.connector}
        parts["vision_tower._vision_tower.vision_model."] = self.tower
        for prefix, part in parts.items():
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            own = {n: t for n, t in own.items() if not n.startswith("head.")}
            part.load_state_dict(own)
        self.eval()

    def spliced(self, ids, image):
        """Embeddings [1, T, H]: `ids` has one image mark, which the features replace."""
        hidden = self.tower(image[None], output_hidden_states=True).hidden_states[-2][:, 1:]
        features = self.connector(hidden)[0]
        place = ids.index(-200)
        embed = self.phi.get_input_embeddings()
        before, after = torch.tensor(ids[:place]), torch.tensor(ids[place + 1 :], dtype=torch.int64)
        return torch.cat([embed(before), features, embed(after)])[None], len(features), place


def marked(tokenizer, text):
    """Chunks between images tokenized apart, joined by -200, as the reference does."""
    ids = []
    for number, chunk in enumerate(text.split(IMAGE)):
        ids += ([-200] if number else []) + tokenizer(chunk).input_ids
    return ids


@torch.no_grad()
def test_logits_loss_and_greedy_answer_equal_the_restatement(published):
    model, processor = load_tinyllava(published)
    restated = Restated(published)
    image = preprocess_image(processor, Image.effect_noise((80, 60), 90).convert("RGB"))
    encoded = tokenize_turns(processor.tokenizer, TURNS, image_tokens(model.config))
    ids, labels = torch.from_numpy(encoded.input_ids)[None], torch.from_numpy(encoded.labels)[None]
    found = model(input_ids=ids, labels=labels, pixel_values=image[None], attention_mask=torch.ones_like(ids))

    text = "".join(
        [
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives ",
            "helpful, detailed, and polite answers to the user's questions. USER: <image>\n",
            "Is this image real or fake? ASSISTANT: This is a fake image.<|endoftext|>",
        ]
    )
    embeddings, count, _ = restated.spliced(marked(processor.tokenizer, text), image)
    assert count == 15 == int((encoded.input_ids == model.config.image_token_index).sum())
    expected = restated.phi(inputs_embeds=embeddings, labels=labels)
    assert (found.logits - expected.logits).abs().max() == 0.0
    assert found.loss == expected.loss

    prompt = tokenize_turns(processor.tokenizer, [(TURNS[0][0], "")], 15)
    inputs = torch.from_numpy(prompt.input_ids)[None]
    answer = model.generate(
        input_ids=inputs, pixel_values=image[None], attention_mask=torch.ones_like(inputs), max_new_tokens=12
    )[0, inputs.shape[1] :].tolist()
    embeddings, *_ = restated.spliced(marked(processor.tokenizer, text.rpartition(" This is")[0]), image)
    greedy = []
    for _ in range(len(answer)):
        greedy.append(int(restated.phi(inputs_embeds=embeddings).logits[0, -1].argmax()))
        new = restated.phi.get_input_embeddings()(torch.tensor([[greedy[-1]]]))
        embeddings = torch.cat([embeddings, new], 1)
    assert answer == greedy


@torch.no_grad()
def test_the_output_bias_counts(published):
    model, processor = load_tinyllava(published)
    ids = torch.from_numpy(tokenize_turns(processor.tokenizer, [("Hello", "")], 15).input_ids)[None]
    image = torch.zeros(1, 3, 56, 56)
    with_bias = model(input_ids=ids, pixel_values=image).logits
    bias = model.lm_head.bias.clone()
    model.lm_head.bias.zero_()
    assert torch.allclose(model(input_ids=ids, pixel_values=image).logits + bias, with_bias, atol=1e-5)
    assert bias.abs().max() > 0.1


@torch.no_grad()
def test_padding_changes_no_answer(published):
    model, processor = load_tinyllava(published)
    image = torch.randn(1, 3, 56, 56)
    ids = torch.from_numpy(tokenize_turns(processor.tokenizer, TURNS, 15).input_ids)[None]
    alone = model(input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids)).logits
    end = processor.tokenizer.convert_tokens_to_ids(END)
    padded = torch.cat([ids, torch.full((1, 9), end)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 9, dtype=torch.int64)], 1)
    found = model(input_ids=padded, pixel_values=image, attention_mask=mask).logits[:, : ids.shape[1]]
    assert torch.allclose(found, alone, atol=1e-5)


def test_a_batch_of_text_alone_gives_the_connector_zero_gradients_not_none():
    model, processor = load_tinyllava(TINY)
    encoded = tokenize_turns(processor.tokenizer, [("What is a camera?", "A camera.")], 15)
    ids, labels = torch.from_numpy(encoded.input_ids)[None], torch.from_numpy(encoded.labels)[None]
    model(input_ids=ids, labels=labels, pixel_values=torch.zeros(1, 3, 56, 56)).loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None
    assert gradient.abs().max() == 0
    bias = model.lm_head.bias.grad
    assert bias is not None
    assert bias.abs().max() > 0


def test_folders_load_back_bit_for_bit_and_go_back_to_published_names(published, tmp_path):
    before = load_file(published / "model.safetensors")
    model, processor = load_tinyllava(published)
    save_tinyllava(model, processor, tmp_path / "ours", read_unused_head(open_model_folder(published)))
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert {name for name in saved if not name.startswith(("model.", "lm_head."))} == set()
    assert {hf_name(name) for name in before if not hf_name(name).startswith(HEAD)} == set(saved)
    again, _ = load_tinyllava(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    write_published(tmp_path / "ours", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (published / "config.json").read_text()
    )


def test_published_names_map_both_ways():
    for name in (
        "language_model.model.layers.3.self_attn.q_proj.weight",
        "language_model.lm_head.bias",
        "vision_tower._vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        "vision_tower._vision_tower.vision_model.head.probe",
        "connector._connector.0.weight",
        "connector._connector.2.bias",
    ):
        assert hf_name(name) != name
        assert published_name(hf_name(name)) == name


def test_the_published_size():
    """3,202,178,928 parameters without the unused head; 769 positions for the golden prompt."""
    config = make_config(PHI2, SIGLIP, image_token_id=50295)
    assert image_tokens(config) == 728
    assert count_parameters(config) == {"vision": 412987248, "connector": 9507840, "language": 2779683840}


def copied(published, tmp_path, **changes):
    folder = tmp_path / "broken"
    shutil.copytree(published, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"language_model__lm_head__bias": None}, r"1 missing \(lm_head\.bias\)"),
        ({"extra__weight": torch.zeros(2)}, r"1 unexpected \(extra\.weight\)"),
        ({"connector._connector.0.bias": torch.zeros(3)}, r"linear_1\.bias \[3\] for \[64\]"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_tensors_that_do_not_fit_are_listed(published, tmp_path, changes, said):
    folder = copied(published, tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        load_tinyllava(folder)


def test_another_architecture_is_named(published, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(published, folder)
    values = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"model_type": "qwen2"}, "'qwen2'"),
        ({"connector_type": "resampler"}, "connector_type 'resampler', expected 'mlp2x_gelu'"),
    ):
        (folder / "config.json").write_text(json.dumps({**values, **changes}))
        with pytest.raises(ValueError, match=re.escape(said)):
            open_model_folder(folder)


def test_damaged_and_missing_files_are_named(published, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(published, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        open_model_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        open_model_folder(folder)
    with pytest.raises(ValueError, match="no such folder"):
        open_model_folder(tmp_path / "nowhere")


def test_labels_are_ignored_where_the_image_stands(published):
    _, processor = load_tinyllava(published)
    encoded = tokenize_turns(processor.tokenizer, TURNS, 15)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert (encoded.labels[encoded.input_ids == image_id] == IGNORE).all()
