"""All groups of benchmark cases, by name, in the order they run."""

from engines import (
    benchmark_checkpoint,
    benchmark_finetune,
    benchmark_input,
    benchmark_model,
    benchmark_scaling,
)

GROUPS = {
    **benchmark_input.GROUPS,
    **benchmark_model.GROUPS,
    **benchmark_scaling.GROUPS,
    **benchmark_checkpoint.GROUPS,
    **benchmark_finetune.GROUPS,
}
