"""What the layouts share: which files are images, and reporting misfits."""

from pathlib import Path

from dataio.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LITTER = (".txt", ".csv", ".json", ".md", ".ini", ".db", ".xml", ".html", ".zip", ".log")


def is_litter(name: str) -> bool:
    """Whether a file beside the images is surely none of them."""
    return name.lower().endswith(_LITTER)


class Misfits:
    """Collects files that fit no pattern: an error listing the first ten, or a skip list."""

    def __init__(self, source: str | Path, expected: str, skip: bool) -> None:
        self.source, self.expected, self.skip = source, expected, skip
        self.skipped: list[tuple[str, str]] = []
        self._count = 0
        self._first: list[str] = []

    def add(self, path: str, reason: str) -> None:
        if self.skip:
            self.skipped.append((path, reason))
            return
        self._count += 1
        if len(self._first) < 10:
            self._first.append(f"{path} ({reason})")

    def check(self) -> None:
        """Raise a UserError if there were any and they are not to be skipped."""
        if self._count:
            raise UserError(
                f"--source {self.source}: {self._count} files fit no pattern of this layout, expected {self.expected}; "
                f"first: {'; '.join(self._first)}. Remove them, or set them aside with --skip-unknown"
            )
