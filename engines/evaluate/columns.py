"""The columns of a predictions table as arrays, for all that is computed from them."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engines.evaluate.calibration import calibration_of
from engines.evaluate.predictions import clusters, label_indices, label_spaces, unseen_generators

THRESHOLD = 0.5  # an image is called fake where P(fake) is at least this
MERGED = ("stable_diffusion_1_4", "stable_diffusion_1_5")


class Labels:
    """A table's columns as arrays of N rows, in its order; made once for each evaluation.

    Attributes:
        table: the table itself.
        space: the generator head's names. generators: the same and then those true
            generators that the head has no output for.
        generator, generator_pred, object, object_pred: int64 [N], positions in `generators`
            and `objects`; an object is -1 where unknown.
        p_fake: float64 [N]. calibration: of the checkpoint, or None. calibrated: the calibrated
            P(fake), None without a calibration.
        called_fake, called_fake_calibrated, unsure: bool [N]; the latter two None without one.
        fake, known, closed: bool [N]: not nature; of known object; of a generator in `space`.
        cluster: int64 [N], equal for images of one group; None without groups.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.space, self.objects = label_spaces(table)
        self.generators = (*self.space, *unseen_generators(table))
        self.sample_id: NDArray[np.int64] = table["sample_id"].to_numpy()
        self.generator = label_indices(table, "generator", self.generators)
        self.generator_pred = label_indices(table, "generator_pred", self.space)
        self.object = label_indices(table, "object", self.objects)
        self.object_pred = label_indices(table, "object_pred", self.objects)
        self.p_fake: NDArray[np.float64] = table["p_fake"].to_numpy()
        self.fake = self.generator != 0
        self.known = self.object >= 0
        self.closed = self.generator < len(self.space)
        self.called_fake = self.p_fake >= THRESHOLD
        self.in_top5 = self._in_top5(table)
        self.cluster = clusters(table)
        self.calibration = calibration_of(table)
        self.calibrated: NDArray[np.float64] | None = None
        self.called_fake_calibrated: NDArray[np.bool_] | None = None
        self.unsure: NDArray[np.bool_] | None = None
        if self.calibration is not None:
            self.calibrated = self.calibration.probability(self.p_fake)
            self.called_fake_calibrated = self.calibration.calls_fake(self.calibrated)
            self.unsure = self.calibration.abstains(self.calibrated)

    @property
    def can_merge(self) -> bool:
        """Whether the label space has both of `MERGED`."""
        return all(name in self.space for name in MERGED)

    def merged(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Generator labels [n] with the second of `MERGED` renamed to the first."""
        first, second = (self.space.index(name) for name in MERGED)
        return np.where(labels == second, first, labels)

    def _in_top5(self, table: pa.Table) -> NDArray[np.bool_]:
        column = table["object_top5"].combine_chunks()
        rows = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy())
        flat = pa.table({"name": column.flatten()})
        hits = (label_indices(flat, "name", self.objects) == self.object[rows]) & self.known[rows]
        return np.bincount(rows[hits], minlength=len(column)) > 0
