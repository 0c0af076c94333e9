"""Work that several processes share without talking to each other, as the tasks of a job array."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dataio.core.errors import UserError

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ArrayTask:
    """One of `of` tasks that share a list of work, as in a job array; `number` counts from 0."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "ArrayTask":
        """Read "i/n".

        Raises:
            UserError: it is not that, or i is not in 0 ... n-1.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            raise UserError("expected i/n with i from 0 to n-1, as in 0/8 ... 7/8", field="task", value=text)
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def label(self) -> str:
        """The name of its lock and temporary files."""
        return f"{self.number}-of-{self.of}"

    def among(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Its part of the work: every n-th item."""
        return items[self.number :: self.of]


def parse_task(task: str | None, *, finish: bool) -> ArrayTask | None:
    """The task that a command names as "i/n"; None if the command does all of the work, or ends it.

    Args:
        finish: whether the command only merges what the tasks did.

    Raises:
        UserError: not such a text, or both.
    """
    if task is not None and finish:
        raise UserError("--task and --finish: give one; --finish comes when all tasks are done")
    return ArrayTask.parse(task) if task is not None else None


def check_settings(folder: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise a UserError that names the first setting in which a rerun differs."""
    for name in settings:
        if stored.get(name) != settings[name]:
            raise UserError(
                f"{folder}: was begun with {name} {stored.get(name)!r}, not {settings[name]!r}; "
                "use the same, or another output folder, or remove this one"
            )
