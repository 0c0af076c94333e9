"""All groups of benchmark cases, by name, in the order they run."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from engines.benchmark.case import Group

_MODULES = {
    "cases_input": ("shard", "read", "decode", "load", "load-small"),
    "cases_train": ("step", "train", "eval"),
    "cases_scaling": ("scaling",),
    "cases_checkpoint": ("checkpoint",),
    "cases_mlm": ("finetune", "finetune-full"),
    "cases_ablation": ("worth",),
}


class _Groups(Mapping[str, Group]):
    """Imports a group's module on first use, so that a case's memory holds no other case's libraries."""

    def __init__(self) -> None:
        self._module = {name: module for module, names in _MODULES.items() for name in names}

    def __getitem__(self, name: str) -> Group:
        group: Group = import_module(f"engines.benchmark.{self._module[name]}").GROUPS[name]
        return group

    def __iter__(self) -> Iterator[str]:
        return iter(self._module)

    def __len__(self) -> int:
        return len(self._module)


GROUPS = _Groups()
