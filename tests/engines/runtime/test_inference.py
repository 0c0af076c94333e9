"""How far the host runs ahead of results, and batches by the size of images."""

import pytest
import torch

from engines.runtime.inference import HostCopy, fetch_late, inference_batch


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_order_and_two_batches_late(count):
    begun = []

    def copies():
        for number in range(count):
            begun.append(number)
            yield HostCopy([torch.tensor([number]), torch.tensor([-number])])

    taken = []
    for found, negative in fetch_late(copies(), ahead=2):
        taken.append(int(found))
        assert int(negative) == -int(found)
        assert len(begun) == min(count, len(taken) + 2)
    assert taken == list(range(count))


def test_batches_have_as_many_pixels_whatever_their_size():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert inference_batch(224, 128, gpu) == 256
    assert inference_batch(448, 8, gpu) == 64
    assert inference_batch(32, 8, gpu) == 1024  # the most
    assert inference_batch(4096, 12, gpu) == 12  # what the training takes is never too much
    assert inference_batch(32, 2048, gpu) == 2048
    assert inference_batch(32, 12, cpu) == 12
