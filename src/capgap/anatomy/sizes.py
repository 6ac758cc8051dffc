"""What can be read off an architecture's table and a config: shapes, sizes, parameter counts, configs of students."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from capgap.anatomy.axes import (
    EXPERT,
    HIDDEN,
    KV,
    NEURON,
    POSITION,
    VOCAB,
    WITHIN_HEAD,
    Axis,
    Dimension,
    Q,
    Shape,
    Table,
)
from capgap.errors import ModelError, ShapeError


class Anatomy:
    """An architecture's table together with the config of one model of it.

    Raises: ModelError if the config describes a variant that the table does not hold for.
    """

    def __init__(self, table: Table, config: PretrainedConfig):
        self.table, self.config = table, config
        fields = table.fields
        for name, wanted in fields.fixed.items():
            found = getattr(config, name, wanted)
            if found != wanted:
                raise ModelError(
                    f"a {config.model_type} with {name} = {found!r} has no anatomy; the one there is holds for "
                    f"{wanted!r}"
                )
        self.heads: int = getattr(config, fields.heads)
        kv_heads = getattr(config, fields.kv_heads, None) if fields.kv_heads else None
        own = getattr(config, fields.head_dim, None) if fields.head_dim else None
        hidden: int = getattr(config, fields.hidden)
        self.head_dim: int = own or hidden // self.heads
        self.shape = Shape(
            getattr(config, fields.layers),
            hidden,
            kv_heads or self.heads,
            getattr(config, fields.neurons, None) or 4 * hidden,
            getattr(config, fields.experts) if fields.experts else None,
        )
        self.group_size = self.heads // self.shape.kv_heads

    def hidden_of(self, kv_heads: int) -> int | None:
        """The hidden size that goes with so many key-value heads where heads are bound; None where they are free."""
        return None if self.table.fields.head_dim else kv_heads * self.group_size * self.head_dim

    def sizes(self, shape: Shape | None = None) -> dict[Axis, Any]:
        """The length of each axis, for the config's own shape or for another one, whose fields may be arrays."""
        shape = shape or self.shape
        return {
            HIDDEN: shape.hidden,
            Q: shape.kv_heads * self.group_size * self.head_dim,
            KV: shape.kv_heads * self.head_dim,
            NEURON: shape.neurons,
            EXPERT: shape.experts,
            VOCAB: self.config.vocab_size,
            POSITION: getattr(self.config, "max_position_embeddings", 0),
            WITHIN_HEAD: self.head_dim,
        }

    def parameters(self, shape: Shape, present: Sequence[str]) -> Any:
        """The parameter count at `shape`, whose fields may be arrays.

        Args:
            present: the names of the parameters that a model of this config has, those shared once.
        """
        # Of each kind of dimensions, in the trunk or in one layer, how many there are.
        counts: Counter[tuple[bool, tuple[Dimension, ...]]] = Counter()
        for name in present:
            _, layer, axes = self.table.match(name)
            if layer in (None, 0):
                counts[layer is not None, axes] += 1
        sizes = self.sizes(shape)
        total: Any = 0
        for (in_layers, axes), count in counts.items():
            product = count * math.prod(length(axis, sizes) for axis in axes)
            total = total + product * (shape.layers if in_layers else 1)
        return total

    def config_at(self, shape: Shape, kept_layers: Sequence[int] | None = None) -> PretrainedConfig:
        """The config of a model of another shape.

        Args:
            kept_layers: which of the old layers stay, where configs hold a list with an entry for each layer.
        Raises: ShapeError with the reason of the installed transformers, if it refuses the shape.
        """
        names, config = self.table.fields, self.config
        what = f"a {config.model_type} of {shape} is not possible"
        bound = self.hidden_of(shape.kv_heads)
        if bound is not None and bound != shape.hidden:
            raise ShapeError(
                f"{what}: its hidden size is its number of heads x the head size of {self.head_dim}, {bound} here"
            )
        fields = copy.deepcopy(config.to_dict())
        wanted: dict[str | None, int | None] = {
            names.layers: shape.layers,
            names.hidden: shape.hidden,
            names.kv_heads: shape.kv_heads,
            names.heads: shape.kv_heads * self.group_size,
            names.head_dim: self.head_dim,
            names.neurons: shape.neurons,
            names.experts: shape.experts,
        }
        known: Mapping[str, str] = config.attribute_map
        for name, value in wanted.items():
            if name is not None:
                fields[known.get(name, name)] = value
        if shape.experts is not None:
            fields["num_experts_per_tok"] = min(config.num_experts_per_tok, shape.experts)
        for name in names.by_layer:
            if isinstance(fields.get(name), list):
                fields[name] = [fields[name][i] for i in kept_layers or range(shape.layers)]
        try:
            return type(config).from_dict(fields)
        except Exception as error:
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
            raise ShapeError(f"{what}: {''.join(reason).removeprefix('ValueError: ')}") from None


def length(dimension: Dimension, sizes: Mapping[Axis, Any]) -> Any:
    """How long a dimension is, by the lengths of its axes."""
    return sizes[dimension] if isinstance(dimension, str) else sum(sizes[part] for part in dimension.parts)
