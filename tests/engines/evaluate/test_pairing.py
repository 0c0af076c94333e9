"""Which images two evaluations share: by identity, in any order, with duplicates, and in older tables."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dataio.core.errors import UserError
from engines.evaluate.compare import compare
from engines.evaluate.pairing import LEAST_COMMON, Side, pair_images
from engines.evaluate.predictions import PredictionArrays, build_table
from tests.random_predictions import random_arrays

COUNT = 80


def _identified(seed: int = 1, first: int = 0, **data: Any) -> PredictionArrays:
    about = {
        "folder": f"data/{first}",
        "split": "test",
        "identity": "source",
        "plan_sha256": "0" * 64,
        **data,
    }
    names = [f"{number:032x}" for number in range(first, first + COUNT)]
    return replace(random_arrays(COUNT, seed), identity=names, data=about)


def _reordered(arrays: PredictionArrays, order: Any, **changes: Any) -> PredictionArrays:
    """The same predictions from shards of another order."""
    columns = ("generator", "object", "generator_probability", "object_top5")
    assert arrays.identity is not None
    return replace(
        arrays,
        **{name: getattr(arrays, name)[order] for name in columns},
        identity=[arrays.identity[i] for i in order],
        sample_id=np.arange(len(order)),
        key=[str(i) for i in range(len(order))],
        **changes,
    )


def _blurred(arrays: PredictionArrays) -> PredictionArrays:
    noise = np.random.default_rng(3).dirichlet(np.ones(9), len(arrays.key))
    return replace(arrays, generator_probability=0.4 * arrays.generator_probability + 0.6 * noise)


def _compared(a: PredictionArrays, b: PredictionArrays) -> dict[str, Any]:
    return compare(Side("one", build_table(a)), Side("two", build_table(b)), resamples=50)


def test_the_order_in_the_shards_does_not_matter() -> None:
    a, order = _identified(), np.random.default_rng(0).permutation(COUNT)
    b = _blurred(a)
    straight = _compared(a, b)
    assert straight["paired_by"] == "source" and straight["notes"] == []
    other = {**a.data, "plan_sha256": "1" * 64}
    for left, right in (
        (a, _reordered(b, order, data=other)),
        (_reordered(a, order), _reordered(b, order[::-1])),
    ):
        found = _compared(left, right)
        assert (found["images"], found["notes"]) == (COUNT, [])
        for key in ("overall", "per_generator", "sentences"):
            assert found[key] == straight[key]
    assert straight["overall"]["generator_error"]["mcnemar"]["only_b_wrong"] > 0


def test_disjoint_images_are_refused_though_places_and_labels_agree() -> None:
    """Two lists of as many photographs have the same keys and labels."""
    a, b = _identified(), _identified(first=1000)
    with pytest.raises(UserError) as caught:
        _compared(a, b)
    message = str(caught.value)
    assert message.startswith(
        "two: predictions of other images than one has: none of its images is among them"
    )
    assert "data/0 (test split)" in message and "data/1000 (test split)" in message and "\n" not in message


def test_the_common_images_are_compared_and_the_others_counted() -> None:
    a = _identified()
    b = _reordered(_blurred(a), np.arange(30, COUNT))
    found, alone = _compared(a, b), _compared(_reordered(a, np.arange(30, COUNT)), b)
    assert found["overall"] == alone["overall"] and found["images"] == COUNT - 30
    assert (found["a"]["left_out"], found["b"]["left_out"]) == (30, 0)
    assert "only the 50 images that both have are compared; 30 of one and 0 of two" in found["notes"][0]
    few = _reordered(b, np.arange(LEAST_COMMON - 1))
    with pytest.raises(UserError, match="only 19 of its images are among them"):
        _compared(a, few)
    assert _compared(few, few)["images"] == LEAST_COMMON - 1  # nothing is left out


def test_an_image_that_occurs_several_times_is_paired_as_often() -> None:
    a = _identified()
    assert a.identity is not None
    generator = a.generator.copy()
    generator[1:3] = 1, 0  # the same file under two labels
    a = replace(a, identity=["f" * 32] * 3 + list(a.identity[3:]), generator=generator)
    pairing = pair_images(
        Side("one", build_table(a)), Side("two", build_table(_reordered(a, np.arange(COUNT)[::-1])))
    )
    assert pairing.a.num_rows == COUNT and pairing.left_out == (0, 0)
    assert pairing.a["generator"].equals(pairing.b["generator"])
    shorter = pair_images(
        Side("one", build_table(a)), Side("two", build_table(_reordered(a, np.arange(1, COUNT))))
    )
    assert shorter.left_out == (1, 0)


def test_other_labels_of_the_same_image_are_refused() -> None:
    a = _identified()
    generator = a.generator.copy()
    generator[7] = (generator[7] + 1) % 9
    with pytest.raises(
        UserError,
        match=r"two: 1 images have other labels than in one .key, generator, object: 7, .* compare evaluations",
    ):
        _compared(a, replace(a, generator=generator))


def test_older_tables_are_compared_by_place_with_a_warning() -> None:
    old = random_arrays(COUNT, 1)
    found = _compared(old, _blurred(old))
    assert found["paired_by"] == "key" and "one and two: does not identify its images" in found["notes"][0]
    mixed = _compared(old, _identified())
    assert mixed["paired_by"] == "key" and mixed["notes"][0].startswith("one: does not identify")
    assert mixed["a"]["data"] is None and mixed["b"]["data"]["folder"] == "data/0"


def test_digests_of_files_and_of_stored_images_are_not_mixed() -> None:
    a, stored = _identified(), _identified(identity="stored")
    found = _compared(a, stored)
    assert found["paired_by"] == "key" and "identify their images differently" in found["notes"][0]
    with pytest.raises(UserError, match=r"cannot be found in one: .* not sharded from the same list"):
        _compared(a, _identified(identity="stored", plan_sha256="1" * 64))
    assert _compared(stored, stored)["paired_by"] == "stored"
