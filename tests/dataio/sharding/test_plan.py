"""The plan: the same for the same names, and made without holding them all."""

import csv
import tracemalloc
from pathlib import Path

from dataio.images.codec import preset_policy
from dataio.layouts import open_layout
from dataio.layouts.base import Record
from dataio.layouts.genimage import GENERATORS
from dataio.layouts.manifest import ManifestLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.plan import make_plan, read_task
from dataio.sources.source import Source


class Names:
    """A layout of names without files, as many as wanted."""

    name = "names"
    object_in_json = "index"
    generators = GENERATORS
    objects = ("a", "b")

    def __init__(self, folder: Path, count: int) -> None:
        self.root, self.source, self.count = str(folder), Source(folder), count
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def records(self):
        for number in range(self.count):
            split = "test" if number % 10 == 0 else "val" if number % 50 == 1 else "train"
            path = f"stable_diffusion_v_1_4/imagenet_ai_0419_sdv4/train/ai/{number:010d}.png"
            yield Record(path, GENERATORS[number % 9], number % 2, split, GENERATORS[number % 8 + 1])

    def read(self, path: str) -> bytes:
        raise AssertionError("a plan of PNGs reads none of them")


SETTINGS = {"seed": 0, "samples_per_shard": 100}


def plan_of(layout, folder: Path):
    folder.mkdir(exist_ok=True)
    return make_plan(layout, folder, preset_policy("default"), dict(SETTINGS))


def peak(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_plan_holds_every_source_once_in_the_order_it_always_had(tmp_path):
    plan = plan_of(Names(tmp_path, 4000), tmp_path / "work")
    lines = [line for task in plan.tasks for line in read_task(tmp_path / "work", task)]
    assert {line[0] for line in lines} == {record.path for record in Names(tmp_path, 4000).records()}
    assert len(lines) == plan.sources == 4000
    # Taken when the records were still sorted in one list: shard folders begun then can go on.
    assert plan.sha256 == "8edee1e9fa088b34c6cc472a511d4e7b5b909556199e487c9fc0182ad71c36ab"
    counts = [(task.split, task.number, task.count) for task in plan.tasks[-5:]]
    assert counts[:2] == [("val", 0, 80), ("test", 0, 100)] and counts[-1] == ("test", 3, 100)
    assert [task.first_key for task in plan.tasks] == [
        sum(task.count for task in plan.tasks[:n]) for n in range(len(plan.tasks))
    ]


def test_the_plan_of_drawn_images_is_the_one_it_always_was(tmp_path):
    write_synthetic(tmp_path / "images", images=60, size=16, seed=2)
    plan = plan_of(open_layout("synthetic", tmp_path / "images"), tmp_path / "work")
    assert plan.sha256 == "d350dd4726aea6e529d2030e02291cba770fd69a4ba2a03f37f83174d087f4df"
    assert plan.policy.history is not None and plan.policy.history["96:2"] == 4
    assert sum(plan.policy.history.values()) == 25


def test_ten_times_the_images_need_no_more_memory(tmp_path):
    plan_of(Names(tmp_path, 100), tmp_path / "warm")
    few = peak(lambda: plan_of(Names(tmp_path, 4_000), tmp_path / "few"))
    many = peak(lambda: plan_of(Names(tmp_path, 40_000), tmp_path / "many"))
    # A list of the records takes about 500 bytes for each.
    assert (many - few) / 36_000 < 30, (few, many)


class Everything(Source):
    """A folder that has every file it is asked for."""

    def has(self, path: str) -> bool:
        return True


def test_a_long_csv_is_not_held_either(tmp_path):
    def listed(count: int) -> int:
        path = tmp_path / f"{count}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "generator", "object", "group"])
            writer.writerows([f"images/{n:08d}.png", "nature", "", n // 2] for n in range(count))

        def read() -> None:
            layout = ManifestLayout(path)
            layout.source = Everything(tmp_path)
            assert sum(1 for _ in layout.records()) == count

        return peak(read)

    listed(100)
    few, many = listed(2_000), listed(20_000)
    # Hashes of paths and groups are held and sorted, to find repetitions; a row takes about 600 bytes.
    assert (many - few) / 18_000 < 80, (few, many)
