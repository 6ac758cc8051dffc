"""What a model costs, from its configuration alone: parameters, FLOPs, memory. No weights are read."""

from capgap.cost.counts import (
    Flops,
    Parameters,
    Shape,
    count_parameters,
    distill_flops_per_token,
    flops_per_token,
    shape_of,
)
from capgap.cost.formats import format_bytes, format_count, format_flops
from capgap.cost.memory import Memory, training_memory

__all__ = [
    "Flops",
    "Memory",
    "Parameters",
    "Shape",
    "count_parameters",
    "distill_flops_per_token",
    "flops_per_token",
    "format_bytes",
    "format_count",
    "format_flops",
    "shape_of",
    "training_memory",
]
