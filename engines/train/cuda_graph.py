"""Forward and backward as one CUDA graph per size of a pass: the host launches once instead of a thousand times."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from dataio.core.errors import one_line
from engines.config.detector import Config
from engines.runtime import fault_injection as faults
from engines.runtime.distributed import World
from engines.train.batchnorm import RunningStatistics
from engines.train.meters import MetricSums
from engines.train.pass_step import PassInputs, PassStep

_WARM_UP = 3  # passes before the capture: cuDNN chooses its algorithms, libraries allocate


class FlatGradients:
    """All gradients as views of one tensor: zeroed at once, all-reduced at once, in one fixed order.

    Attributes:
        flat: float32 [P].
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        learning = [p for p in parameters if p.requires_grad]
        align = 64  # elements: vectorized loads
        sizes = [-(-p.numel() // align) * align for p in learning]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=learning[0].device)
        offset = 0
        for parameter, size in zip(learning, sizes, strict=True):
            # The parameter's own strides, which the fused optimizer needs.
            parameter.grad = self.flat.as_strided(parameter.size(), parameter.stride(), offset)
            offset += size


def forbidden(config: Config, world: World, obstacles: Sequence[str]) -> str:
    """Why the passes of a run cannot be captured, "" if they can.

    Args:
        obstacles: layers that draw from torch's generator.
    """
    if config.train.graph == "off":
        return "train.graph is off"
    if world.device.type != "cuda":
        return "there is no GPU"
    if config.train.compile:
        return "train.compile is set"
    if faults.any_set():
        return "faults are injected"
    return f"{obstacles[0]} draws from torch's generator" if obstacles else ""


class PassGraphs:
    """The captured passes of a trainer; replaying one equals `PassStep.compute` on the same inputs.

    Args:
        step: what is captured. model: unwrapped, in the mode it is trained in. statistics: of its norms.
        sums: that the passes add to. blank: inputs of a pass of so many micro-batches.

    Attributes:
        gradients: which the passes add to.
    """

    def __init__(
        self,
        step: PassStep,
        model: nn.Module,
        statistics: RunningStatistics,
        sums: MetricSums,
        blank: Callable[[int], PassInputs],
        world: World,
    ) -> None:
        self._step, self._model, self._statistics, self._sums = step, model, statistics, sums
        self._blank, self._world = blank, world
        self.gradients = FlatGradients(list(model.parameters()))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, PassInputs]] = {}

    def capture(self, passes: Sequence[range]) -> str:
        """Capture the passes of a step; weights, statistics and sums are as before.

        Returns:
            why it cannot be done, on this rank or another; "" if it is done.
        """
        reason = ""
        self._statistics.begin_step()
        try:
            inputs = {count: self._blank(count) for count in {len(each) for each in passes}}
            for held in inputs.values():
                self._warm_up(held)
            pool = torch.cuda.graph_pool_handle()
            # The largest first: the smaller ones then fit into its memory.
            for count in sorted(inputs, reverse=True):
                graph = torch.cuda.CUDAGraph()
                # Other threads (the loader's) may allocate meanwhile.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self._step.compute(inputs[count], self._sums, self._model)
                self._graphs[count] = graph, inputs[count]
        except RuntimeError as error:  # of PyTorch: an operation that waits for the device, or no memory
            reason = f"the passes cannot be captured ({one_line(error)[:200]})"
            self._graphs.clear()
        self._statistics.restore()
        self._sums.sums.zero_()
        self.gradients.flat.zero_()
        if self._world.distributed and self._world.size > 1:
            failed = torch.tensor(float(bool(reason)), device=self._world.device)
            dist.all_reduce(failed)
            reason = reason or ("another process cannot capture its passes" if failed.item() else "")
        return reason

    def _warm_up(self, inputs: PassInputs) -> None:
        """Let libraries choose their algorithms and allocate, on a stream of its own as captures have."""
        device = self._world.device
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step.compute(inputs, self._sums, self._model)
        current.wait_stream(side)

    def run(self, inputs: PassInputs) -> None:
        """Add a pass's gradient, metrics and statistics."""
        graph, captured = self._graphs[inputs.numbers.shape[1]]
        captured.copy_(inputs)
        graph.replay()
