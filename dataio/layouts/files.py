"""Files that fit no pattern of a layout: skipped where harmless, else reported."""

from pathlib import Path

from dataio.core.errors import UserError
from dataio.core.log import log

_LITTER = (".txt", ".csv", ".json", ".md", ".ini", ".db", ".xml", ".html", ".zip", ".log")


class Misfits:
    """Collects files that fit no pattern: an error listing the first ten, or a skip list.

    Args:
        layout: its name. source: what is read. expected: the pattern, for messages.
        skip: collect in `skipped` instead of failing.
    """

    def __init__(self, layout: str, source: str | Path, expected: str, skip: bool) -> None:
        self.layout, self.source, self.expected, self.skip = layout, source, expected, skip
        self.skipped: list[tuple[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Forget all files, before they are listed again."""
        self.skipped.clear()
        self._count = 0
        self._first: list[str] = []
        self._zips, self._first_zip = 0, ""

    def is_litter(self, path: str) -> bool:
        """Whether a file is a known companion of images, such as a README; zips are counted."""
        if path.lower().endswith(".zip"):
            self._zips += 1
            self._first_zip = self._first_zip or path
        return path.lower().endswith(_LITTER)

    def add(self, path: str, reason: str) -> None:
        self._count += 1
        if len(self._first) < 10:
            self._first.append(f"{path} ({reason})")
        if self.skip:
            self.skipped.append((path, reason))

    def check(self, fitting: int) -> None:
        """Raise a UserError if nothing fits, or if something does not and is not to be skipped.

        Args:
            fitting: how many files fit.
        """
        if fitting == 0:
            other = f"{self._count} other files, first {self._first[0]}" if self._count else "empty"
            if self._zips and not self._count:
                other = f"{self._zips} zip file(s), which are not opened, first {self._first_zip}: give it, or unpack"
            raise UserError(
                f"no images of the {self.layout} layout ({other}), expected {self.expected}; check the layout "
                "and the source",
                field="source",
                value=self.source,
            )
        if self._zips:
            log.warning(
                f"{self.source}: {self._zips} zip files in it are not opened, first {self._first_zip}; unpack "
                "what is to be used"
            )
        if self._count and not self.skip:
            fit = "1 file fits" if self._count == 1 else f"{self._count} files fit"
            raise UserError(
                f"{fit} no pattern of the {self.layout} layout, expected {self.expected}; first: "
                f"{'; '.join(self._first)}. Remove them, or set them aside with skip_unknown (--skip-unknown)",
                field="source",
                value=self.source,
            )
