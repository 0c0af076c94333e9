"""Whether labels follow from an order, and whether counting would have given other labels.

Shards that are not mixed show a network one class after the other. Programs that number a
folder's classes by counting them, as some for GenImage and CIFAKE do, shift every label behind a
missing class or file. telltale reads labels from names; the audit reports what counting would have
given, and compares stored labels with names.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from dataio.layouts.registry import RegisteredLayout, find_layout
from engines.audit.sample import AuditedImage

# A split counts as not mixed beyond both bounds: in millions of images a difference of many
# standard deviations can be negligible.
_DEVIATIONS = 6.0
_EFFECT = 0.05
_AGREEMENT = 0.99  # of stored labels with names; below it the audit warns


def check_mixed(labels: NDArray[np.integer]) -> dict[str, Any]:
    """Whether labels in stored order look like a random permutation of themselves.

    Under one, a share sum n_k (n_k - 1) / (n (n - 1)) of neighbours agree, and the rank of a
    fake among all positions is uniform (Mann and Whitney 1947 give its variance).

    Args:
        labels: [N], 0 is nature.

    Returns:
        images, equal_neighbours and expected (shares), position_auroc (of a later place for
        telling fakes; null with one class), mixed.
    """
    count = len(labels)
    sizes = np.bincount(labels).astype(np.float64)
    fake = labels != 0
    real, fakes = int((~fake).sum()), int(fake.sum())
    counts: dict[str, Any] = {"images": count, "equal_neighbours": None, "expected": None}
    counts |= {"position_auroc": None, "mixed": True}
    if count < 2:
        return counts
    equal = float((labels[1:] == labels[:-1]).mean())
    expected = float((sizes * (sizes - 1)).sum() / (count * (count - 1)))
    spread = np.sqrt(expected * (1 - expected) / (count - 1))
    counts |= {"equal_neighbours": round(equal, 4), "expected": round(expected, 4)}
    clustered = equal - expected > max(_EFFECT, _DEVIATIONS * spread)
    drifting = False
    if real and fakes:
        auroc = float(roc_auc_score(fake, np.arange(count)))
        counts["position_auroc"] = round(auroc, 4)
        spread = np.sqrt((count + 1) / (12 * real * fakes))
        drifting = abs(auroc - 0.5) > max(_EFFECT, _DEVIATIONS * spread)
    counts["mixed"] = not (clustered or drifting)
    return counts


class CountedLabels:
    """The labels that numbering each folder's classes by counting would have given."""

    def __init__(self, layout: str) -> None:
        registered = find_layout(layout)
        self._counting = registered.counting if registered else ""
        self._classes: dict[str, Counter[int]] = {}  # GenImage: photographs of each class, by folder
        self._files: dict[str, list[tuple[str, int]]] = {}  # CIFAKE: (name, object) by folder

    def add(self, path: str, generator: str, label: int | None) -> None:
        folder, _, name = path.rpartition("/")
        if label is None:
            return
        if self._counting == "classes" and generator == "nature" and name.startswith("n"):
            self._classes.setdefault(folder, Counter())[label] += 1
        elif self._counting == "files":
            self._files.setdefault(folder, []).append((name.lower(), label))

    def result(self) -> dict[str, Any] | None:
        """Folders, images, and images whose object would change; None for other layouts."""
        shifted: dict[str, int] = {}
        images = 0
        for folder, classes in self._classes.items():
            images += sum(classes.values())
            shifted[folder] = sum(
                classes[label] for rank, label in enumerate(sorted(classes)) if rank != label
            )
        for folder, files in self._files.items():
            images += len(files)
            # Sorted names run "(10)", "(2)" ... "(9)", "": truck, automobile ... ship, airplane.
            counted = [9, *range(1, 9), 0]
            shifted[folder] = sum(
                label != counted[place % 10] for place, (_, label) in enumerate(sorted(files))
            )
        if not shifted:
            return None
        wrong = sorted((folder for folder in shifted if shifted[folder]), key=lambda name: -shifted[name])
        return {
            "images": images,
            "folders": len(shifted),
            "shifted_images": sum(shifted.values()),
            "shifted_folders": len(wrong),
            "first": wrong[:5],
        }


def compare_with_names(
    images: Iterable[AuditedImage], layout: str, objects: Sequence[str]
) -> dict[str, Any] | None:
    """Compare stored labels with those in the sources' names.

    Args:
        layout: of the shards or source; where generators may have any name, as in a list of files,
            only real or fake is compared.
        objects: the label space.

    Returns:
        images compared, real_fake_wrong, generator_wrong, object_wrong and a first example;
        None where names hold no labels.
    """
    counts: dict[str, Any] = {"images": 0, "real_fake_wrong": 0, "generator_wrong": 0, "object_wrong": 0}
    counts["first"] = ""
    registered = _layout_of_names(layout)
    for image in images:
        named = registered.labels_of_name(image.path)
        if named is None:
            continue
        generator, label = named
        stored_generator = image.ref.generator
        counts["images"] += 1
        wrong = {
            "real_fake_wrong": (stored_generator == "nature") != (generator == "nature"),
            "generator_wrong": not registered.free_generators and stored_generator != generator,
            # Names of validation photographs have no class to compare with.
            "object_wrong": not registered.free_generators
            and None not in (label, image.ref.object)
            and label != image.ref.object,
        }
        for key, value in wrong.items():
            counts[key] += value
        if any(wrong.values()) and not counts["first"]:
            stored = "no object" if image.ref.object is None else objects[image.ref.object]
            counts["first"] = f"{image.path} is stored as {stored_generator}, {stored}"
    return counts if counts["images"] else None


def _layout_of_names(layout: str) -> RegisteredLayout:
    """The layout whose file names the sources have; GenImage's for shards made of other shards."""
    registered = find_layout(layout) or find_layout("genimage")
    assert registered is not None
    return registered


def disagrees(counts: dict[str, Any] | None) -> bool:
    """Whether too many stored labels differ from the names."""
    if counts is None:
        return False
    worst = max(counts["real_fake_wrong"], counts["generator_wrong"], counts["object_wrong"])
    return bool(worst > (1 - _AGREEMENT) * counts["images"])
