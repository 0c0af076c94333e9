import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataio.core.errors import UserError
from engines.evaluate.predictions import (
    PredictionArrays,
    build_table,
    checkpoint_info,
    clusters,
    label_indices,
    label_spaces,
    probabilities,
    probability_column,
    read_predictions,
    unseen_generators,
    write_predictions,
)

GENERATORS = ("nature", "adm", "glide")
OBJECTS = tuple(f"object {i}" for i in range(7))


def make_arrays(count: int = 20, seed: int = 0) -> PredictionArrays:
    """Random predictions in a shuffled order; sample i has the key of i."""
    random = np.random.default_rng(seed)
    ids = random.permutation(count).astype(np.int64)
    return PredictionArrays(
        sample_id=ids,
        key=[f"{i:09d}" for i in ids],
        generator=random.integers(0, len(GENERATORS), count),
        object=random.integers(-1, len(OBJECTS), count),
        generator_probability=random.dirichlet(np.ones(len(GENERATORS)), count),
        object_top5=np.stack([random.permutation(len(OBJECTS))[:5] for _ in range(count)])
        if count
        else np.zeros((0, 5), np.int64),
        generators=GENERATORS,
        objects=OBJECTS,
        checkpoint={"checkpoint": "best.pt", "step": 7},
    )


def test_rows_are_sorted_and_keep_what_belongs_together() -> None:
    arrays = make_arrays()
    rows = build_table(arrays).to_pylist()
    assert [row["sample_id"] for row in rows] == list(range(20))
    for position, sample in enumerate(arrays.sample_id):
        row, p = rows[sample], arrays.generator_probability[position]
        assert row["key"] == f"{sample:09d}"
        assert row["generator"] == GENERATORS[arrays.generator[position]]
        assert row["generator_pred"] == GENERATORS[p.argmax()]
        known = arrays.object[position] >= 0
        assert row["object"] == (OBJECTS[arrays.object[position]] if known else None)
        assert row["object_top5"] == [OBJECTS[i] for i in arrays.object_top5[position]]
        assert row["object_pred"] == row["object_top5"][0]
        assert row["p_fake"] == pytest.approx(1 - p[0], abs=1e-15)
        assert [row[f"p_{name}"] for name in GENERATORS] == pytest.approx(p, abs=1e-7)


def test_types_are_the_documented_ones() -> None:
    types = {field.name: str(field.type) for field in build_table(make_arrays()).schema}
    assert types == {
        "sample_id": "int64",
        "key": "string",
        "generator": "string",
        "generator_pred": "string",
        "object": "string",
        "object_pred": "string",
        "p_fake": "double",
        "p_nature": "float",
        "p_adm": "float",
        "p_glide": "float",
        "object_top5": "list<element: string>",
    }


def test_small_p_fake_keeps_its_digits() -> None:
    """Photographs must still be ranked where P(nature) rounds to 1."""
    arrays = make_arrays(2)
    tiny = np.array([[1.0, 1e-20, 1e-21], [1.0, 3e-20, 1e-21]])
    table = build_table(replace(arrays, sample_id=np.arange(2), generator_probability=tiny))
    assert table["p_fake"].to_pylist() == pytest.approx([1.1e-20, 3.1e-20], rel=1e-12)


@pytest.mark.parametrize("count", [0, 1, 20])
def test_round_trip(tmp_path, count: int) -> None:
    table = build_table(make_arrays(count))
    path = tmp_path / "predictions.parquet"
    path.write_text("an older file")
    write_predictions(path, table)
    again = read_predictions(path)
    assert again.equals(table, check_metadata=True)
    assert label_spaces(again) == (GENERATORS, OBJECTS)
    assert checkpoint_info(again) == {"checkpoint": "best.pt", "step": 7}
    assert probabilities(again).shape == (count, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.parquet"]


def test_same_predictions_give_the_same_bytes(tmp_path) -> None:
    arrays = make_arrays()
    order = np.argsort(arrays.sample_id)
    ordered = PredictionArrays(
        sample_id=arrays.sample_id[order],
        key=[arrays.key[i] for i in order],
        generator=arrays.generator[order],
        object=arrays.object[order],
        generator_probability=arrays.generator_probability[order],
        object_top5=arrays.object_top5[order],
        generators=arrays.generators,
        objects=arrays.objects,
        checkpoint=arrays.checkpoint,
    )
    write_predictions(tmp_path / "a", build_table(arrays))
    write_predictions(tmp_path / "b", build_table(ordered))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pandas_reads_it(tmp_path) -> None:
    import pandas as pd

    write_predictions(tmp_path / "p.parquet", build_table(make_arrays()))
    frame = pd.read_parquet(tmp_path / "p.parquet")
    assert len(frame) == 20 and list(frame["object_top5"][3]) == frame["object_top5"][3].tolist()


def test_generator_called_fake_has_its_own_column() -> None:
    table = build_table(replace(make_arrays(), generators=("nature", "fake", "glide")))
    assert probability_column("fake") == "p_generator_fake"
    assert len(set(table.column_names)) == table.num_columns
    assert np.allclose(table["p_generator_fake"].to_numpy() + table["p_glide"].to_numpy(), table["p_fake"])


def test_label_space_without_objects() -> None:
    arrays = make_arrays(3)
    nothing = np.full(3, -1)
    table = build_table(replace(arrays, objects=(), object=nothing, object_top5=np.zeros((3, 1), np.int64)))
    assert table["object_pred"].to_pylist() == [None] * 3
    assert table["object_top5"].to_pylist() == [[]] * 3


def test_few_objects_have_a_shorter_top5() -> None:
    arrays = make_arrays(4)
    top = np.array([[1, 0]] * 4)
    table = build_table(
        replace(arrays, objects=("cat", "dog"), object=np.zeros(4, np.int64), object_top5=top)
    )
    assert table["object_top5"].to_pylist() == [["dog", "cat"]] * 4


def test_label_indices_of_unknown_names_are_minus_one() -> None:
    table = pa.table({"name": ["b", None, "z", "a"]})
    assert label_indices(table, "name", ("a", "b")).tolist() == [1, -1, -1, 0]


def _with(arrays: PredictionArrays, name: str, position, value) -> PredictionArrays:
    changed = np.array(getattr(arrays, name))
    changed[position] = value
    values: dict[str, Any] = {name: changed}
    return replace(arrays, **values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: replace(a, sample_id=np.r_[a.sample_id[1:], a.sample_id[1]]), ["more than once"]),
        (lambda a: replace(a, sample_id=a.sample_id + (a.sample_id >= 4)), ["sample 4 is missing"]),
        (lambda a: replace(a, sample_id=a.sample_id - 1), ["sample 0 is missing"]),
        (lambda a: _with(a, "generator_probability", (3, 1), np.nan), ["nan", "diverge"]),
        (lambda a: _with(a, "generator_probability", (3, 1), np.inf), ["inf", "diverge"]),
        (lambda a: _with(a, "generator_probability", 3, [1.5, -0.5, 0]), ["1.5", "sum to 1"]),
        (lambda a: _with(a, "generator_probability", 3, [0.1, 0.2, 0.3]), ["sum to 1"]),
        (lambda a: _with(a, "generator", 2, 3), ["generator", "label 3", "0 to 2"]),
        (lambda a: _with(a, "generator", 2, -1), ["generator", "label -1", "0 to 2"]),
        (lambda a: _with(a, "object", 2, 7), ["object", "label 7", "-1 to 6"]),
        (lambda a: _with(a, "object_top5", (2, 4), 9), ["object_top5", "label 9", "0 to 6"]),
        (lambda a: replace(a, object_top5=a.object_top5[:, :4]), ["object_top5", "[20, 5]"]),
        (lambda a: replace(a, generators=("nature", "adm")), ["generator_probability", "[20, 2]"]),
        (lambda a: replace(a, generators=("adm", "nature", "glide")), ["'adm'", "expected 'nature'"]),
        (lambda a: replace(a, generators=("nature", "adm", "adm")), ["adm", "twice"]),
        (lambda a: replace(a, objects=(*OBJECTS[:6], OBJECTS[0])), ["object 0", "twice"]),
        (lambda a: replace(a, key=list(a.key)[1:]), ["key", "[19]", "[20]"]),
    ],
)
def test_bad_arrays_are_one_line(change, words) -> None:
    with pytest.raises(UserError) as caught:
        build_table(change(make_arrays()))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def _rewrite_metadata(path, **values) -> None:
    table = pq.read_table(path)
    metadata = {
        **table.schema.metadata,
        **{f"telltale.{k}".encode(): json.dumps(v) for k, v in values.items()},
    }
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _replace_column(path, name: str, values) -> None:
    table = pq.read_table(path)
    index = table.column_names.index(name)
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array(values)), path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.unlink(), ["not found", "telltale evaluate"]),
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), ["not a readable Parquet file"]),
        (lambda p: p.write_bytes(b""), ["not a readable Parquet file"]),
        (lambda p: pq.write_table(pa.table({"a": [1]}), p), ["telltale.generators"]),
        (lambda p: _rewrite_metadata(p, generators=["nature", "adm", "vqdm"]), ["p_glide", "p_vqdm"]),
        (lambda p: _rewrite_metadata(p, generators=["nature", "glide", "adm"]), ["their order"]),
        (lambda p: _rewrite_metadata(p, objects=OBJECTS[1:]), ["column object", "label space"]),
        (lambda p: _replace_column(p, "sample_id", [0, *range(19)]), ["more than once"]),
        (lambda p: _replace_column(p, "sample_id", [None, *range(19)]), ["1 rows have no sample_id"]),
        (lambda p: _replace_column(p, "p_adm", np.full(20, np.nan, np.float32)), ["nan"]),
        (lambda p: _replace_column(p, "p_fake", np.full(20, np.nan)), ["p_fake"]),
        (lambda p: _replace_column(p, "generator_pred", ["dalle"] * 20), ["generator_pred"]),
        (lambda p: _replace_column(p, "generator", [None, *["adm"] * 19]), ["1 rows", "generator"]),
    ],
)
def test_bad_files_are_one_line(tmp_path, damage, words) -> None:
    path = tmp_path / "predictions.parquet"
    write_predictions(path, build_table(make_arrays()))
    read_predictions(path)
    damage(path)
    with pytest.raises(UserError) as caught:
        read_predictions(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message


def test_groups_are_read_and_images_without_one_are_alone(tmp_path) -> None:
    arrays = make_arrays(6)
    assert clusters(build_table(arrays)) is None
    by_id = ["a", None, "a", "", "b", ""]
    table = build_table(replace(arrays, group=[by_id[i] for i in arrays.sample_id]))
    write_predictions(tmp_path / "p", table)
    again = read_predictions(tmp_path / "p")
    assert again["group"].to_pylist() == by_id
    codes = clusters(again)
    assert codes is not None and codes[0] == codes[2] and len(set(codes.tolist())) == 5
    # No two images share one: as if there were none.
    assert clusters(build_table(replace(arrays, group=list("abcdef")))) is None
    assert clusters(build_table(replace(arrays, group=[None] * 6))) is None
    assert clusters(again.slice(0, 0)) is None


def test_groups_of_several_chunks() -> None:
    table = build_table(replace(make_arrays(6), group=list("aabbcc")))
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 4), table.slice(5)])
    first, second = clusters(table), clusters(pieces)
    assert first is not None and second is not None and first.tolist() == second.tolist()


def test_true_generators_that_the_model_cannot_name(tmp_path) -> None:
    arrays = replace(make_arrays(6), unseen=("dalle",), generator=np.array([0, 1, 2, 3, 3, 0]))
    write_predictions(tmp_path / "p", build_table(arrays))
    table = read_predictions(tmp_path / "p")
    assert unseen_generators(table) == ("dalle",) and label_spaces(table) == (GENERATORS, OBJECTS)
    assert table["generator"].to_pylist().count("dalle") == 2
    assert unseen_generators(build_table(make_arrays())) == ()
    with pytest.raises(UserError, match="twice"):
        build_table(replace(arrays, unseen=("adm",)))


@pytest.mark.parametrize(
    ("group", "words"), [(pa.array([1] * 20), "int64"), (pa.array([["a"]] * 20), "list")]
)
def test_groups_that_are_no_names_are_one_line(tmp_path, group, words) -> None:
    path = tmp_path / "p"
    pq.write_table(build_table(make_arrays()).append_column("group", group), path)
    with pytest.raises(UserError, match=f"column group holds {words}"):
        read_predictions(path)


def test_a_folder_is_not_a_table(tmp_path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_predictions(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "missing" / "predictions.parquet"
    with pytest.raises(UserError, match="cannot be written"):
        write_predictions(path, build_table(make_arrays()))
    assert list(tmp_path.iterdir()) == []
