"""Memory of distilling on one device that shards nothing, from configurations alone."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from capgap.cost.counts import Shape, count_parameters, shape_of
from capgap.errors import ModelError, ShapeError

Precision = Literal["float32", "bfloat16"]
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: the student's float32 weights, and under bfloat16 the copies that products are computed with.
        gradients: float32.
        optimizer: AdamW's two moments, float32.
        activations: what the student's forward pass keeps for its backward pass.
        head: the logits of one chunk of tokens, float32: the student's and their gradient, and with a teacher
            its logits and log-probabilities.
        teacher_weights: in the precision of the products.
        teacher_activations: the largest working set of one layer, and the final hidden states.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    teacher_weights: int
    teacher_activations: int

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.head
            + self.teacher_weights
            + self.teacher_activations
        )


@dataclass(frozen=True)
class _Kept:
    """Tensors that one layer keeps for the backward pass, as multiples of a token's row of that width.

    `residual` (width hidden) stays float32 under autocast. `reads` are the inputs of linear layers (width
    hidden): in float32 readers of one tensor share it, under autocast each reader holds a cast of its own.
    """

    residual: int
    reads: int
    reads_autocast: int
    query: int
    key: int
    neurons: int


# Gated: each of two RMSNorms keeps its input and the normalised input; q and output, k and v; gate, its
# activation, up and their product. NeoX reads both norms from one residual, and its q, k and v are copies
# beside the fused projection; GPT-2's fused q, k, v are kept once, its GELU is written out in five steps.
_GATED = _Kept(residual=4, reads=2, reads_autocast=5, query=2, key=2, neurons=4)
_LAYERS = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gpt_neox": _Kept(residual=1, reads=2, reads_autocast=2, query=7, key=0, neurons=2),
    "gpt2": _Kept(residual=2, reads=2, reads_autocast=2, query=4, key=0, neurons=5),
}


def training_memory(
    student_config: PreTrainedConfig,
    *,
    teacher_config: PreTrainedConfig | None = None,
    tokens_per_micro_batch: int,
    context: int,
    precision: Precision = "bfloat16",
    chunk_tokens: int = 1024,
    activation_checkpointing: bool = False,
) -> Memory:
    """Memory of one device that trains the student, under AdamW and with the teacher beside it.

    Weights, gradients and moments are float32 in either precision (16 bytes a parameter). Under bfloat16 the
    products run in autocast: 2 bytes more for each weight that multiplies, activations of 2 bytes but for the
    residual stream and the norms. Attention is assumed to be fused (scaled_dot_product_attention without
    dropout: no context x context matrix is kept) and the loss to be computed in chunks of tokens. Not
    counted: gradients of activations while a layer is passed backwards, the device's own context,
    fragmentation; leave 10 to 20 % for them.

    Args:
        tokens_per_micro_batch: tokens in one forward pass, over all sequences.
        context: tokens of one sequence; a micro batch holds whole sequences.
        chunk_tokens: tokens whose logits exist at one time.
        activation_checkpointing: keep the residual stream between layers, and one layer computed anew.
    Raises: ShapeError if the token counts do not fit; ModelError for an unknown precision or architecture.
    """
    if precision not in BYTES:
        raise ModelError(f"precision = {precision!r} must be one of {', '.join(BYTES)}")
    for name, value in (("context", context), ("chunk_tokens", chunk_tokens)):
        if value < 1:
            raise ShapeError(f"{name} = {value} must be at least 1")
    if tokens_per_micro_batch < context or tokens_per_micro_batch % context:
        raise ShapeError(
            f"tokens_per_micro_batch = {tokens_per_micro_batch} must be a multiple of context = {context}, "
            "because a micro batch holds whole sequences"
        )
    student = count_parameters(student_config)
    shape = shape_of(student_config)
    tokens = tokens_per_micro_batch
    chunk = min(chunk_tokens, tokens)
    head = 2 * 4 * chunk * shape.vocab
    teacher_weights = teacher_activations = 0
    if teacher_config is not None:
        large = shape_of(teacher_config)
        head += 2 * 4 * chunk * large.vocab
        teacher_weights = count_parameters(teacher_config).total * BYTES[precision]
        teacher_activations = tokens * _working_set(large, precision)
    return Memory(
        weights=4 * student.total + (2 * student.matmul if precision == "bfloat16" else 0),
        gradients=4 * student.total,
        optimizer=8 * student.total,
        activations=tokens * _kept(shape, precision, activation_checkpointing),
        head=head,
        teacher_weights=teacher_weights,
        teacher_activations=teacher_activations,
    )


def _kept(shape: Shape, precision: Precision, checkpointing: bool) -> int:
    """Bytes that one token keeps: its layers, the last norm's input and normalised input, and its output."""
    layer = _kept_by_layer(shape, precision)
    ends = 3 * 4 * shape.hidden
    if checkpointing:
        return shape.layers * 4 * shape.hidden + layer + ends
    return shape.layers * layer + ends


def _kept_by_layer(shape: Shape, precision: Precision) -> int:
    kept = _LAYERS.get(shape.model_type)
    if kept is None:
        raise ModelError(
            f"architecture {shape.model_type!r}: what its layers keep for the backward pass is not known; "
            f"known are {', '.join(_LAYERS)}"
        )
    width = BYTES[precision]
    reads = kept.reads if precision == "float32" else kept.reads_autocast
    count = width * (
        reads * shape.hidden + kept.query * shape.query + kept.key * shape.key + kept.neurons * shape.neurons
    )
    count += 4 * kept.residual * shape.hidden + 4 * shape.heads
    if shape.model_type == "qwen3":
        # Its norms of q and k keep their inputs, float32 inside, and the normalised inputs.
        count += (4 + width) * (shape.query + shape.key)
    return count


def _working_set(shape: Shape, precision: Precision) -> int:
    """Bytes a token needs in one layer when nothing is kept: two residual rows, and attention or the FFN."""
    widest = max(2 * shape.query + 2 * shape.key, 3 * shape.neurons)
    return BYTES[precision] * (3 * shape.hidden + widest)
