"""TinyLLaVA's text side: the `phi` chat template, tokens, labels and the processor.

Template and label mask reimplement TinyLLaVA_Factory's `phi` conversation, in which only the
answers and their end tokens are learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, CodeGenTokenizer, LlavaConfig, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE = "<image>"
END = "<|endoftext|>"
IGNORE = -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)
# An answer must not contain these markers: the reference's label mask fails on them, and a
# model that learned them would continue with the user's turn.
MARKERS = (" ASSISTANT: ", END, IMAGE)

# The same template for other programs (apply_chat_template, vLLM); a test compares it with `render`.
CHAT_TEMPLATE = (
    "{{ '" + SYSTEM.replace("'", "\\'") + "' }}"
    "{% for message in messages %}"
    "{% set part = namespace(text='', image=false) %}"
    "{% if message['content'] is string %}{% set part.text = message['content'] %}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{% set part.image = true %}"
    "{% else %}{% set part.text = part.text + item['text'] %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if '<image>' in part.text %}{% set part.image = true %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ 'USER: ' }}{% if part.image %}"
    "{{ ('<image>\n' + part.text.replace('<image>', '').strip()).strip() }}"
    "{% else %}{{ part.text }}{% endif %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + part.text + '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizedTurns:
    """One conversation as tokens.

    Each image is a single token here, and becomes its N placeholders only in `input_ids` and
    `labels`: a set of a million conversations is kept in memory, and placeholders would be
    most of it.

    Attributes:
        ids: int32 [t], token ids.
        learned: bool [t], whether the model is to learn the token.
        image_id: the id of the image token.
        image_tokens: N, the placeholders of an image.
    """

    ids: np.ndarray
    learned: np.ndarray
    image_id: int
    image_tokens: int

    def __len__(self) -> int:
        """T, the number of tokens with each image as its placeholders."""
        return len(self.ids) + self.images * (self.image_tokens - 1)

    @property
    def images(self) -> int:
        """How many images the text has room for, 0 or 1."""
        return int((self.ids == self.image_id).sum())

    @property
    def input_ids(self) -> np.ndarray:
        """int64 [T], each image as its N placeholders."""
        return self._expanded(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """int64 [T], the token ids where the model is to learn them, else -100."""
        return self._expanded(np.where(self.learned & (self.ids != self.image_id), self.ids, IGNORE))

    def _expanded(self, values: np.ndarray) -> np.ndarray:
        repeats = np.where(self.ids == self.image_id, self.image_tokens, 1)
        return np.repeat(values.astype(np.int64), repeats)


def render(turns: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans to learn.

    Args:
        turns: (question, answer) pairs. If the last answer is "", the text ends with
            "ASSISTANT:", for the model to continue.

    Returns:
        text; (start, end) of " " + answer + end token, for each answered turn.
    """
    text, spans = SYSTEM, []
    for number, (question, answer) in enumerate(turns):
        if IMAGE in question:
            question = f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()
        text += f"USER: {question} ASSISTANT:"
        if answer == "" and number == len(turns) - 1:
            break
        start = len(text)
        text += f" {answer}{END}"
        spans.append((start, len(text)))
    return text, spans


def tokenize_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], image_tokens: int
) -> TokenizedTurns:
    """Tokens and labels of a conversation; see `render` for `turns`.

    A token is learned where its first character is in an answer's span. The space before an
    answer merges into its first token, so the span begins with it.

    Args:
        image_tokens: placeholders for each `<image>`.
    """
    text, spans = render(turns)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = np.asarray([begin for begin, _ in tokens["offset_mapping"]], np.int64)
    learned = np.zeros(len(begins), bool)
    for start, end in spans:
        learned |= (begins >= start) & (begins < end)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    return TokenizedTurns(np.asarray(tokens["input_ids"], np.int32), learned, image_id, image_tokens)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with `<image>` as a single token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.padding_side = "right"
    return tokenizer


# Words of the templates and of the sets that `write_vqa` writes: the tiny tokenizer has a token
# for each, as Phi-2's has for " fake" and " real".
TINY_WORDS = """
a an and answer are artificial artificially as assistant between by camera can chat curious detailed did
does explain fake for from generated generator genuine gives helpful image in intelligence is it just letter
like look made not object of or photograph picture polite question questions real shows tell that the this
to user was what which who with you your A B C D Fake Is Real The This What Which USER ASSISTANT
""".split()  # noqa: SIM905 (a list of 75 strings is not easier to read)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A small byte-level tokenizer of Phi-2's class, with 256 bytes and `TINY_WORDS`.

    The merges build each word (with the space before it) from left to right, so that a merge
    cannot take a letter from the middle of another word.
    """
    letters = _byte_letters()
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in TINY_WORDS:
        prefix = "\u0120"  # how byte-level tokenizers write a space
        for letter in word:
            if prefix + letter not in vocabulary:
                merges.append((prefix, letter))
                vocabulary[prefix + letter] = len(vocabulary)
            prefix += letter
    vocabulary[END] = len(vocabulary)
    special = {name: END for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokenizer = CodeGenTokenizer(vocab=vocabulary, merges=merges, **special, model_max_length=3072)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


def _byte_letters() -> list[str]:
    """The printable character that GPT-2 uses for each of the 256 bytes (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = [], 0
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + extra))
            extra += 1
    return letters


def make_processor(tokenizer: PreTrainedTokenizerBase, config: LlavaConfig) -> LlavaProcessor:
    """The processor, built from constants: the published checkpoint has no preprocessor file.

    Images are resized to a square (bicubic, ignoring the aspect ratio) and scaled to [-1, 1].
    Pillow resizes: the default backend differs by up to 2 of 255 levels from the images that
    the weights were trained on.
    """
    side = config.vision_config.image_size
    images = SiglipImageProcessorPil(
        size={"height": side, "width": side},
        resample=Image.Resampling.BICUBIC,
        rescale_factor=1 / 255,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def preprocess_image(processor: LlavaProcessor, image: Image.Image) -> Any:
    """One image as the vision tower's input: float32 tensor [3, S, S] in [-1, 1]."""
    return processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
