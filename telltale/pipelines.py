"""A split of a shard folder as a pipeline of the webdataset library, for trainers that are not ours.

Our own training reads shards through `dataio.loading`, whose order is exact and which resumes.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.utils import pytorch_worker_info

from dataio.core.errors import UserError, one_line, reason_of
from dataio.images.opening import MEGAPIXELS, Undecodable, open_image, to_rgb, upright
from dataio.shards.local_cache import CacheOptions, ShardCache
from dataio.shards.manifest import LabelSpaces
from dataio.shards.remote_cache import default_cache, default_cap
from dataio.shards.remote_folder import open_cache
from dataio.shards.shard_set import ShardSet
from dataio.shards.tar_reader import check_shard_file
from dataio.sources.remote_path import AnyPath

_IMAGES = ("pil", "tensor", "bytes")
_FIELDS = ("image", "generator", "generator_name", "object", "object_name", "source", "__key__")
_AHEAD = 3  # remote shards that are copied or held at a time, the one that is read among them


def webdataset(
    folder: str | PathLike[str],
    split: str = "train",
    *,
    image: str = "pil",
    fields: Sequence[str] | None = None,
    shuffle: int = 0,
    seed: int = 0,
    handler: Callable[[Exception], bool] = wds.reraise_exception,
) -> "ShardPipeline":
    """A split of a folder of shards as a pipeline of the webdataset library, for any trainer.

    Every process (torchrun's variables or torch.distributed) and every worker of a DataLoader reads
    whole shards of its own (`split_by_node`, `split_by_worker`), so processes get about equally many
    samples, not exactly. A sample is a dict:

    * `image`: upright RGB, see the argument.
    * `generator`, `generator_name`: the source's number and name; 0 is "nature", photographs.
    * `object`, `object_name`: the object's number and name; -1 and "" where it is unknown.
    * `source`: the path that the image was made from, under the layout's root.
    * `__key__`: nine digits, unique in the split. `__url__`: the shard.

    Args:
        folder: written by `telltale shard`, or its URL, which is read through copies on this
            machine (`TELLTALE_CACHE`).
        split: "train", "val" or "test".
        image: "pil" for a PIL.Image, "tensor" for uint8 [3, height, width], "bytes" for the file.
        fields: names of a sample's entries; samples are then tuples of these, in this order.
        shuffle: samples in the buffer that is drawn from; shards are then shuffled too, anew in
            every epoch. 0 reads in the order of the shards.
        seed: of the shuffling. With worker processes it depends on torch's seed as well.
        handler: of the library; gets a UserError for each image or shard that cannot be read.
            `webdataset.warn_and_continue` skips these.

    Returns:
        a pipeline to iterate or to give to `webdataset.WebLoader` or a DataLoader. Its len() is
        the samples of this process in an epoch. Stages may be added (`map`, `batched`, ...).

    Raises:
        UserError: no such folder or split, files missing or truncated, fewer shards than
            processes, an unknown form of images or field, or a number below 0.

    Examples:
        >>> import telltale
        >>> pipeline = telltale.webdataset("data/quickstart", "val", image="tensor")
        >>> sample = next(iter(pipeline))
        >>> sample["image"].dtype, len(sample["__key__"])
        (torch.uint8, 9)
        >>> (sample["generator"] == 0) == (sample["generator_name"] == "nature")
        True
    """
    if image not in _IMAGES:
        raise UserError(f"expected one of {', '.join(_IMAGES)}", field="image", value=image)
    if isinstance(fields, str):
        raise UserError(f"expected a sequence of names such as ({fields!r},)", field="fields", value=fields)
    for name in fields or ():
        if name not in _FIELDS:
            raise UserError(f"expected some of {', '.join(_FIELDS)}", field="fields", value=name)
    for argument, value in (("shuffle", shuffle), ("seed", seed)):
        if value < 0:
            raise UserError("expected 0 or more", field=argument, value=value)
    shards = ShardSet(fspath(folder), split)
    limit = shards.manifest["codec"].get("max_megapixels", MEGAPIXELS)
    reader = _Reader(shards.folder, split, shards.shards, handler)
    shape = _Shape(shards.labels, image, None if fields is None else tuple(fields), limit)
    stages: list[Any] = [_Numbers(len(shards.shards)), wds.split_by_node, wds.split_by_worker]
    if shuffle:
        stages += [_Shuffle(len(shards.shards), seed), reader, _Shuffle(shuffle, seed)]
    else:
        stages.append(reader)
    pipeline = ShardPipeline(*stages, wds.map(shape, handler=handler))
    pipeline.describe(f"{folder}, {split}", tuple(shards.shard_sizes.tolist()))
    return pipeline


class ShardPipeline(wds.DataPipeline, wds.FluidInterface):
    """What `webdataset` returns: a pipeline of the library's that knows its length.

    Its length is known until a stage other than `map` is added, or the number of repetitions
    changed; the library's `with_length` sets one then.
    """

    _name = ""
    _samples: tuple[int, ...] = ()
    _counted = True

    def describe(self, name: str, samples: tuple[int, ...]) -> None:
        """Say what it is called in messages, and how many samples each shard has.

        Raises:
            UserError: fewer shards than processes.
        """
        self._name, self._samples = name, samples
        self._own()

    def _own(self) -> tuple[int, ...]:
        """The samples of each shard of this process."""
        rank, processes, _, _ = pytorch_worker_info()
        if len(self._samples) < processes:
            raise UserError(
                f"{self._name}: {len(self._samples)} shards for {processes} processes, expected one for each at "
                "least; start fewer, or shard again with a smaller --samples-per-shard"
            )
        return self._samples[rank::processes]

    def __len__(self) -> int:
        if not self._counted or self.repetitions != 1:
            raise TypeError("the length is unknown after this stage; set it by with_length")
        return sum(self._own())

    def __iter__(self) -> Iterator[Any]:
        self._own()  # also where the processes were joined after this was made
        return super().__iter__()

    def compose(self, *stages: Any) -> "ShardPipeline":
        """A copy with more stages; its length is unknown."""
        made = super().compose(*stages)
        made._counted = False
        return made

    def map(
        self, f: Callable[[Any], Any], handler: Callable[[Exception], bool] = wds.reraise_exception
    ) -> Any:
        """A copy whose samples are `f`'s results, as many as before unless `f` returns None."""
        made = super().map(f, handler=handler)
        made._counted = self._counted
        return made


class _Numbers:
    """The numbers of the shards, as the source of a pipeline."""

    def __init__(self, shards: int) -> None:
        self._shards = shards

    def __call__(self) -> Iterator[int]:
        return iter(range(self._shards))


class _Shuffle(wds.detshuffle):
    """The library's shuffling, in another order in every epoch, process and worker."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, size)
        self._base = seed

    def run(self, src: Iterable[Any]) -> Iterator[Any]:
        """Shuffle one epoch."""
        worker = torch.utils.data.get_worker_info()
        # A worker that is started anew has forgotten the epoch; its seed was drawn for it.
        drawn = 0 if worker is None else worker.seed
        self.seed = (self._base << 40) + (pytorch_worker_info()[0] << 20) + (drawn << 60)
        return super().run(iter(src))


class _Reader:
    """From numbers of shards to the library's raw samples: dicts of bytes by extension."""

    def __init__(
        self,
        folder: AnyPath,
        split: str,
        shards: Sequence[dict[str, Any]],
        handler: Callable[[Exception], bool],
    ) -> None:
        self._folder, self._split, self._shards, self._handler = folder, split, shards, handler
        self._cache: tuple[int, ShardCache] | None = None  # and the process that it is of

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def __call__(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        order = list(numbers)
        try:
            for place, number in enumerate(order):
                try:
                    yield from self._samples(number, order[place : place + _AHEAD])
                except UserError as error:
                    if not self._handler(error):
                        break
        finally:
            if self._cache is not None and self._cache[0] == os.getpid():
                self._cache[1].plan(())  # nothing more is copied, and other processes may evict

    def _samples(self, number: int, ahead: list[int]) -> Iterator[dict[str, Any]]:
        shard = self._shards[number]
        url = str(self._folder / shard["file"])
        hint = f"find what changed with `telltale shard verify {self._folder}`"
        read = 0
        try:
            with open(self._file(number, ahead), "rb") as stream:
                source = {"url": url, "stream": stream}
                for sample in group_by_keys(tar_file_expander(iter([source]))):
                    read += 1
                    yield sample
        except OSError as error:
            raise UserError(f"{url}: cannot be read ({reason_of(error)}); {hint}") from None
        except (tarfile.TarError, ValueError) as error:
            reason = one_line(str(error.args[0] if error.args else error))
            raise UserError(f"{url}: not a readable shard ({reason}); {hint}") from None
        # The library takes a damaged header for the end of the tar.
        if read != shard["samples"]:
            raise UserError(f"{url}: has {read} samples, the manifest says {shard['samples']}; {hint}")

    def _file(self, number: int, ahead: list[int]) -> str:
        """A shard's path on this machine; of a remote one's copy, as long as that is not replaced."""
        if isinstance(self._folder, Path):
            path = self._folder / self._shards[number]["file"]
            check_shard_file(path, self._shards[number]["bytes"])
            return str(path)
        if self._cache is None or self._cache[0] != os.getpid():  # a forked worker has no copying thread
            options = CacheOptions(default_cache(), default_cap(default_cache()))
            self._cache = os.getpid(), open_cache(options, self._folder, self._shards)
        cache = self._cache[1]
        cache.plan(ahead)
        descriptor = cache.descriptor(number)
        if descriptor is None:
            raise UserError(
                f"{self._folder / self._shards[number]['file']}: its SHA-256 is not the manifest's: changed; "
                "upload it again or re-shard"
            )
        return f"/proc/self/fd/{descriptor}"  # opened anew, with a position of its own


class _Shape:
    """From a raw sample to the one that is documented."""

    def __init__(
        self, labels: LabelSpaces, image: str, fields: tuple[str, ...] | None, max_megapixels: float
    ) -> None:
        self._labels, self._image, self._fields, self._limit = labels, image, fields, max_megapixels
        self._generators = {name: number for number, name in enumerate(labels.generators)}
        self._objects = {name: number for number, name in enumerate(labels.objects)}

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Any] | tuple[Any, ...]:
        place = f"{raw['__url__']} key {raw['__key__']}"
        try:
            (extension,) = [name for name in raw if name != "json" and not name.startswith("__")]
            about = json.loads(raw["json"])
            generator, known = about["generator"], about["object"]
            # A folder's JSON has objects by number or by name.
            number = -1 if known is None else known if isinstance(known, int) else self._objects[known]
            sample: dict[str, Any] = {
                "image": self._decoded(raw[extension]),
                "generator": self._generators[generator],
                "generator_name": generator,
                "object": number,
                "object_name": "" if known is None else self._labels.objects[number],
                "source": about["source"],
                "__key__": raw["__key__"],
                "__url__": raw["__url__"],
            }
        except Undecodable as error:
            raise UserError(f"{place}: not a readable image ({one_line(error)[:200]}); {_HINT}") from None
        except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            reason = f"{type(error).__name__}: {one_line(error)[:200]}"
            raise UserError(f"{place}: not a sample of this folder ({reason}); {_HINT}") from None
        return sample if self._fields is None else tuple(sample[name] for name in self._fields)

    def _decoded(self, data: bytes) -> Any:
        if self._image == "bytes":
            return data
        picture = to_rgb(upright(open_image(data, max_megapixels=self._limit)))
        if self._image == "pil":
            return picture
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


_HINT = "`telltale shard verify` of the folder finds what changed"
