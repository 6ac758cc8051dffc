"""What distilling will roughly cost, before the student has a shape of its own."""

import copy
import math
from dataclasses import dataclass

from transformers import PreTrainedConfig

from capgap.cost import (
    Memory,
    Parameters,
    count_parameters,
    distill_flops_per_token,
    shape_of,
    training_memory,
)

H100_FLOPS = 989e12
"""Dense bfloat16 FLOPs a second of one H100 SXM, by its data sheet."""
USED = 0.4
"""The share of it that a well-kept training loop reaches: an assumption."""
H100_BYTES = 80e9
FULL = 0.9
"""The share of a device's memory to plan with; the rest is for what `training_memory` leaves out."""


@dataclass(frozen=True)
class Estimate:
    """A plain estimate of the cost of distilling.

    Attributes:
        student: parameters of the shape that the estimate is made for.
        context: tokens of a sequence.
        flops_per_token: the student's training and the teacher's forward pass.
        memory: of one device that shards nothing, in bfloat16, with one sequence a micro batch.
    """

    student: Parameters
    context: int
    flops_per_token: float
    memory: Memory

    def flops(self, tokens: float) -> float:
        """FLOPs of distilling on `tokens` tokens."""
        return self.flops_per_token * tokens

    def gpu_hours(self, tokens: float) -> float:
        """Hours of one H100 at 40 % of 989e12 FLOPs a second, an assumption, for `tokens` tokens."""
        return self.flops(tokens) / (USED * H100_FLOPS) / 3600


def estimate(student_params: int, teacher: PreTrainedConfig, context: int) -> Estimate:
    """The cost of distilling a student of the teacher's depth, narrowed to about `student_params`."""
    config = narrowed(teacher, student_params)
    memory = training_memory(config, teacher_config=teacher, tokens_per_micro_batch=context, context=context)
    return Estimate(count_parameters(config), context, distill_flops_per_token(config, teacher, context), memory)


def narrowed(config: PreTrainedConfig, parameters: int) -> PreTrainedConfig:
    """A configuration of the same depth and vocabulary, narrowed to about `parameters`.

    All widths shrink by one factor, r: tables shrink by r, the rest by r**2; the FFN takes up what whole
    heads leave over. It is a shape to estimate with, not the one that pruning will choose. Where even the
    smallest width is larger than `parameters`, it is that width.
    """
    counted, shape = count_parameters(config), shape_of(config)
    tables, rest = counted.embedding, counted.non_embedding
    factor = (math.sqrt(tables**2 + 4 * rest * parameters) - tables) / (2 * rest)
    kv_heads = max(1, round(shape.kv_heads * factor))
    heads = kv_heads * (shape.heads // shape.kv_heads)
    narrow = copy.deepcopy(config)
    if hasattr(config, "head_dim"):
        narrow.head_dim = shape.head_dim
        narrow.num_key_value_heads = kv_heads
        # Llama's configuration asks for a width that its heads divide, even where head_dim is given.
        narrow.hidden_size = heads * max(1, round(shape.hidden * factor / heads))
    else:
        narrow.hidden_size = heads * shape.head_dim
    narrow.num_attention_heads = heads
    neurons = max(8, 8 * round(shape.neurons * factor / 8))
    one_more = count_parameters(_with_neurons(narrow, neurons + 8)).total
    here = count_parameters(_with_neurons(narrow, neurons)).total
    neurons += 8 * round((parameters - here) / (one_more - here))
    return _with_neurons(narrow, max(8, neurons))


def _with_neurons(config: PreTrainedConfig, neurons: int) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    setattr(changed, "n_inner" if hasattr(config, "n_inner") else "intermediate_size", neurons)
    return changed
