"""Finetuning conversations: LLaVA's JSON with a folder of images, or WebDataset tars.

A sample is {"id", "image" (absent for text alone), "conversations": [{"from": "human" |
"gpt", "value"}, ...]}. An invalid sample is rejected with its id and the reason; nothing is
fixed silently.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from dataio.core.errors import UserError, one_line, reason_of
from dataio.core.log import log
from dataio.images.opening import MEGAPIXELS, Undecodable, open_image, quiet_pillow, to_rgb, upright
from dataio.shards.tar_reader import safe_members
from dataio.sources.sniff import named_as_image
from dataio.vqa.sample_text import UniqueIds, escaped, is_blank, text_fault

IMAGE_PLACEHOLDER = "<image>"
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_SHORTEST = 512  # pixels: more than any vision tower takes
_MEMBERS_KEPT = 64  # tars whose member list each process caches


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        id: unique in its set, see `UniqueIds`. image: an absolute path, "TAR/MEMBER", or None.
        turns: (question, answer) pairs, at least one.
        metadata: the sample's other labels (generator, object_category).
    """

    id: str
    image: str | None
    turns: tuple[tuple[str, str], ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A sample that was left out, and why."""

    id: str
    reason: str


def read_conversations(
    path: str | Path, images: str | Path | None = None, markers: Sequence[str] = ()
) -> tuple[list[Conversation], list[Rejected]]:
    """Read and validate a set of conversations; images are not opened (see `check_images`).

    Args:
        path: a JSON file, a folder with conversations.json, or a folder of WebDataset tars
            (`<key>.json` with "conversations", the image beside it).
        images: folder that image paths are relative to; None is the file's own. An absolute
            path that does not exist is searched for in it by its file name.
        markers: texts reserved for the chat template, which a conversation must not contain.

    A sample with an id that has occurred becomes "ID#2", "ID#3", ... in the file's order.

    Returns:
        the valid samples, in file order; the rejected ones.

    Raises:
        UserError: no readable file, or no valid sample.
    """
    path = Path(path)
    good: list[Conversation] = []
    rejected: list[Rejected] = []
    ids, contents, repeats = UniqueIds(), set[tuple[str | None, tuple[tuple[str, str], ...]]](), list[str]()
    for number, record in enumerate(_records(path)):
        name = ids.name(_id_of(record, number))
        try:
            sample = _parse(name, record, Path(images) if images else _folder_of(path), markers)
        except ValueError as error:
            rejected.append(Rejected(name, escaped(str(error))))
            continue
        if (sample.image, sample.turns) in contents:
            repeats.append(name)
        contents.add((sample.image, sample.turns))
        good.append(sample)
    if ids.repeated:
        log.info(f"{path}: {ids}")
    if repeats:
        log.warning(
            f"{path}: samples that repeat an earlier one word for word: {len(repeats)}, first {repeats[0]}"
        )
    if not good:
        first = f": {rejected[0].id}: {rejected[0].reason}" if rejected else ""
        raise UserError(f"{path}: no usable conversation among {len(rejected)}{first}")
    return good, rejected


def _id_of(record: Any, number: int) -> str:
    given = record.get("id") if isinstance(record, dict) else None
    return escaped(str(given)) if isinstance(given, str | int | float) and given != "" else f"sample {number}"


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _records(path: Path) -> Iterator[Any]:
    file = path / "conversations.json" if path.is_dir() else path
    if file.is_file():
        yield from _read_list(file)
        return
    tars = sorted(path.glob("*.tar")) if path.is_dir() else []
    if not tars:
        expected = (
            "conversations.json or WebDataset tars in it" if path.is_dir() else "a JSON file or a folder"
        )
        raise UserError(f"{path}: not found or empty, expected {expected}")
    unread = [
        file.name for file in path.iterdir() if re.search(r"\.(tar\.\w+|tgz)$", file.name, re.IGNORECASE)
    ]
    for tar in tars:
        yield from _records_of_tar(tar, unread)
    if unread:
        log.warning(
            f"{path}: not read: {len(unread)}, first {unread[0]}; expected uncompressed tars with an image beside "
            "each .json"
        )


def _read_list(file: Path) -> list[Any]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not readable as JSON ({one_line(error)}); fix it or write it again"
        ) from None
    if not isinstance(records, list):
        raise UserError(
            f"{file}: holds a {type(records).__name__}, expected a list of conversations (LLaVA's format)"
        )
    return records


def _records_of_tar(tar: Path, unread: list[str]) -> Iterator[Any]:
    """The records of one tar; members that belong to none are added to `unread`."""
    members = tar_members(str(tar))
    images: dict[str, list[str]] = {}
    for name in members:
        stem = name.rpartition(".")[0]
        if named_as_image(name) and f"{stem}.json" in members:
            images.setdefault(stem, []).append(f"{tar}/{name}")
        elif not name.endswith(".json"):
            unread.append(f"{tar.name}/{name}")
    for name in members:
        if name.endswith(".json"):
            stem = name.removesuffix(".json")
            try:
                record = json.loads(read_image_bytes(f"{tar}/{name}"))
            except (ValueError, RecursionError) as error:
                record = {"id": f"{tar.name}/{stem}", "broken": str(error)}
            if isinstance(record, dict):
                record = {"id": f"{tar.stem}/{stem}", **record}
                if own := images.get(stem):
                    record["image"] = own[0] if len(own) == 1 else own
            yield record


def _parse(name: str, record: Any, images: Path, markers: Sequence[str]) -> Conversation:
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, expected an object")
    turns = _turns(record.get("conversations"), markers)
    placeholders = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in turns)
    image = record.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise ValueError(f"its image is {image!r}, expected a path (or no key, for text alone)")
    if image is not None and not _can_be_path(image):
        raise ValueError(f"its image is {image!r}, which no file can be named")
    if image is not None and not placeholders:
        raise ValueError(f"has an image but no {IMAGE_PLACEHOLDER} in its questions")
    if image is None and placeholders:
        raise ValueError(f"has {IMAGE_PLACEHOLDER} in its text but no image")
    if placeholders > 1:
        raise ValueError(
            f"has {IMAGE_PLACEHOLDER} {placeholders} times in its questions, expected once: a sample has one image"
        )
    metadata = record.get("metadata")
    return Conversation(
        name,
        None if image is None else resolve_image(image, images),
        tuple(turns),
        metadata if isinstance(metadata, dict) else {},
    )


def _turns(values: Any, markers: Sequence[str]) -> list[tuple[str, str]]:
    if not isinstance(values, list) or not values:
        raise ValueError("has no list of conversations")
    texts = []
    for number, value in enumerate(values):
        roles = _ANSWERS if number % 2 else _ASKS
        role = value.get("from") if isinstance(value, dict) else None
        if role not in roles:
            raise ValueError(f"its message {number} is from {role!r}, expected {roles[0]!r}")
        text = value.get("value")
        if not isinstance(text, str):
            found = "has no text" if text is None else f"is a {type(text).__name__}, expected text"
            raise ValueError(f"its message {number} {found}")
        if fault := text_fault(text):
            raise ValueError(f"its message {number} holds {fault}")
        texts.append(text)
    if len(texts) % 2:
        raise ValueError("ends with a question, expected an answer to it")
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    for question, answer in turns:
        if is_blank(answer):
            raise ValueError("has an empty answer")
        if is_blank(question.replace(IMAGE_PLACEHOLDER, "")):
            raise ValueError("has an empty question")
        for marker in markers:
            if marker in answer or (marker != IMAGE_PLACEHOLDER and marker in question):
                raise ValueError(f"holds the template's own marker {marker!r}")
    return turns


def _can_be_path(image: str) -> bool:
    try:
        return b"\0" not in os.fsencode(image)
    except UnicodeEncodeError:
        return False


def resolve_image(image: str, folder: Path) -> str:
    """The path of a sample's image: absolute and existing, or in `folder`."""
    if not os.path.isabs(image):
        return str(folder / image)
    if not image_exists(image) and (folder / Path(image).name).is_file():
        return str(folder / Path(image).name)
    return image


def split_tar(image: str) -> tuple[str, str] | None:
    """("DIR/NAME.tar", "MEMBER") of an image in a tar, None for a plain file."""
    tar, separator, member = image.partition(".tar/")
    return (f"{tar}.tar", member) if separator else None


@lru_cache(maxsize=_MEMBERS_KEPT)
def tar_members(tar: str) -> dict[str, tuple[int, int]]:
    """(offset, size) in bytes of each file of an uncompressed tar, by name, in the tar's order.

    Raises:
        UserError: not a readable tar.
    """
    try:
        with tarfile.open(tar, "r:") as archive:
            return {m.name: (m.offset_data, m.size) for m in safe_members(archive, tar)}
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(f"{tar}: not a readable tar ({one_line(error)}); copy it again") from None


def image_exists(image: str) -> bool:
    inside = split_tar(image)
    if inside is None:
        return os.path.isfile(image)
    return os.path.isfile(inside[0]) and inside[1] in tar_members(inside[0])


def read_image_bytes(image: str) -> bytes:
    """The bytes of a file, or of a member of a tar ("DIR/NAME.tar/MEMBER").

    Raises:
        UserError: missing or unreadable.
    """
    inside = split_tar(image)
    try:
        if inside is None:
            return Path(image).read_bytes()
        offset, size = tar_members(inside[0])[inside[1]]
        with open(inside[0], "rb") as file:
            file.seek(offset)
            return file.read(size)
    except KeyError:
        raise UserError(f"{image}: no such member in the tar") from None
    except OSError as error:
        raise UserError(f"{image}: cannot be read ({reason_of(error)})") from None


def load_rgb(image: str, max_megapixels: int = MEGAPIXELS) -> Image.Image:
    """Decode an image as upright RGB, as the detector's files are decoded.

    Args:
        image: see `read_image_bytes`. max_megapixels: larger ones are refused.

    Raises:
        UserError: missing or corrupt.
    """
    data = read_image_bytes(image)
    try:
        opened = open_image(data, max_megapixels=max_megapixels, shortest=_SHORTEST)
        return to_rgb(upright(opened))
    except Undecodable as error:
        raise UserError(f"{image}: not a readable image ({one_line(error)[:200]})") from None


def check_images(
    samples: Sequence[Conversation], workers: int = 4
) -> tuple[list[Conversation], list[Rejected]]:
    """Decode every image once before the run, so that a corrupt one does not stop it hours later.

    Returns:
        the samples with a readable image or none; the rejected ones.
    """

    def problem(sample: Conversation) -> str:
        if sample.image is None:
            return ""
        try:
            load_rgb(sample.image)
        except UserError as error:
            return str(error)
        return ""

    with quiet_pillow(), ThreadPoolExecutor(workers) as pool:
        problems = list(pool.map(problem, samples))
    pairs = list(zip(samples, problems, strict=True))
    good = [sample for sample, reason in pairs if not reason]
    return good, [Rejected(sample.id, reason) for sample, reason in pairs if reason]
