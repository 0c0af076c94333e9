"""Sums of errors and losses over batches and ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from engines.runtime.distributed import World
from models.detector.dual_head import dual_head_loss

FIELDS = (
    "images",
    "objects_known",
    "generator_wrong",
    "real_fake_wrong",
    "object_wrong",
    "joint_wrong",
    "generator_loss",
    "object_loss",
)


@dataclass
class MetricSums:
    """Sums over images: float64 [len(FIELDS)] on the device they were counted on."""

    sums: torch.Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "MetricSums":
        return cls(torch.zeros(len(FIELDS), dtype=torch.float64, device=device))

    def add(
        self,
        generator_logits: torch.Tensor,
        object_logits: torch.Tensor,
        generator: torch.Tensor,
        object_label: torch.Tensor,
    ) -> None:
        """Count one batch; no host synchronisation.

        Args:
            generator_logits, object_logits: float [N, classes].
            generator, object_label: int64 [N]; object_label -1 where unknown.
        """
        generator_loss, object_loss = dual_head_loss(generator_logits, object_logits, generator, object_label)
        known = object_label >= 0
        generator_wrong = generator_logits.argmax(1) != generator
        object_wrong = (object_logits.argmax(1) != object_label) & known
        p_fake = 1 - generator_logits.float().softmax(1)[:, 0]
        self.sums += torch.stack(
            [
                # Filled on the device: a copy from the host would make a GPU's step wait.
                torch.full((), float(len(generator)), dtype=torch.float64, device=self.sums.device),
                known.sum().double(),
                generator_wrong.sum().double(),
                ((p_fake >= 0.5) != (generator > 0)).sum().double(),
                object_wrong.sum().double(),
                ((generator_wrong | object_wrong) & known).sum().double(),
                generator_loss.double(),
                object_loss.double(),
            ]
        )

    def reduce(self, world: World) -> "MetricSums":
        """The sum over all ranks."""
        sums = self.sums.clone()
        if world.distributed:
            dist.all_reduce(sums)
        return MetricSums(sums)

    def metrics(
        self, loss_weights: tuple[float, float] = (1.0, 1.0), *, both_classes: bool = True
    ) -> dict[str, float | None]:
        """Errors as fractions and mean losses; None where no object is known.

        Args:
            both_classes: whether the images are of a split with photographs and fakes; otherwise the
                real/fake error is None, since a constant answer would have the error 0.
        """
        s = dict(zip(FIELDS, self.sums.tolist(), strict=True))
        images, known = max(1.0, s["images"]), s["objects_known"]
        object_loss = s["object_loss"] / known if known else 0.0
        return {
            "loss": loss_weights[0] * s["generator_loss"] / images + loss_weights[1] * object_loss,
            "generator_error": s["generator_wrong"] / images,
            "real_fake_error": s["real_fake_wrong"] / images if both_classes else None,
            "object_error": s["object_wrong"] / known if known else None,
            "joint_error": s["joint_wrong"] / known if known else None,
        }
