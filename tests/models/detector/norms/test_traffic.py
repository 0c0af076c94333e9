"""The counted traffic of the fused norms."""

import pytest
import torch

from models.detector.backbones.registry import build_backbone
from models.detector.norms.ghost_norm import use_ghost_norms
from models.detector.norms.traffic import norm_traffic


def test_a_resnet50_moves_fifty_six_gigabytes_a_step_of_256():
    with torch.device("meta"):
        net = build_backbone("resnet50")[0]
    use_ghost_norms(net.to_empty(device="cpu"))
    traffic = norm_traffic(net, 256, 224)
    assert (traffic.norms, traffic.launches) == (53, 318)
    # The stem, then width, blocks, side and stride of each stage, from He et al., table 1.
    inner, outer, followed = 64 * 112**2, 0, 0
    for width, blocks, side, stride in ((64, 3, 56, 1), (128, 4, 28, 2), (256, 6, 14, 2), (512, 3, 7, 2)):
        followed += 4 * width * (blocks - 1) * side**2  # by another block of the stage
        outer += 4 * width * blocks * side**2
        inner += 2 * width * blocks * side**2 + width * side**2 * (stride**2 - 1) + 4 * width * side**2
    assert traffic.values == 256 * (inner + outer)
    assert traffic.read == 2 * 256 * (6 * inner + 8 * outer + followed)
    assert traffic.written == 2 * 256 * (2 * inner + 3 * outer)
    assert traffic.milliseconds(4.27e12) == pytest.approx(13.1, abs=0.1)
    assert net.training
