"""The words in which an architecture's table is written, and what can be read off any table."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PretrainedConfig

from capgap.errors import ModelError, ShapeError

Axis = Literal["hidden", "q", "kv", "neuron", "vocab", "within_head"]
HIDDEN: Axis = "hidden"
Q: Axis = "q"  # query heads x head_dim, ordered by key-value group
KV: Axis = "kv"  # key-value heads x head_dim
NEURON: Axis = "neuron"
VOCAB: Axis = "vocab"
WITHIN_HEAD: Axis = "within_head"  # head_dim, the same for every head, never cut


@dataclass(frozen=True)
class Weight:
    """One row of a table: a module whose `.weight` has these axes, and whose `.bias`, if any, has the first."""

    name: str
    axes: tuple[Axis, ...]

    def __init__(self, name: str, *axes: Axis):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "axes", axes)


@dataclass(frozen=True)
class Shape:
    """What is free when a student is cut: layers, hidden size, key-value heads, FFN neurons of a layer."""

    layers: int
    hidden: int
    kv_heads: int
    neurons: int

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, {self.kv_heads} key-value heads, {self.neurons} neurons"


@dataclass(frozen=True)
class Anatomy:
    """An architecture as a table.

    Attributes:
        model_types: Hugging Face model types it holds for.
        trunk: the weights outside the layers.
        layers_at: the name of the module list of layers.
        layer: the weights of one layer.
        masks: for each axis that can be cut, the rows whose *reading* side the pruning mask sits on. A norm
            stands for all that read its output, as the mask on its output i has the gradient w_i * dL/dw_i.
    """

    model_types: tuple[str, ...]
    trunk: tuple[Weight, ...]
    layers_at: str
    layer: tuple[Weight, ...]
    masks: dict[Axis, tuple[str, ...]]

    def match(self, parameter: str) -> tuple[Weight, int | None, tuple[Axis, ...]]:
        """The one row of a parameter's name, its layer (None in the trunk), and the parameter's axes.

        Raises: ModelError if not exactly one row matches.
        """
        module, _, kind = parameter.rpartition(".")
        inside = re.fullmatch(re.escape(self.layers_at) + r"\.(\d+)\.(.+)", module)
        rows, name = (self.layer, inside[2]) if inside else (self.trunk, module)
        found = [row for row in rows if row.name == name]
        if len(found) != 1 or kind not in ("weight", "bias"):
            raise ModelError(f"parameter {parameter} matches {len(found)} rows of the {self.model_types[0]} anatomy")
        axes = found[0].axes if kind == "weight" else found[0].axes[:1]
        return found[0], int(inside[1]) if inside else None, axes

    def shape(self, config: PretrainedConfig) -> Shape:
        """The shape of a model with this config."""
        return Shape(config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, config.intermediate_size)

    def sizes(self, config: PretrainedConfig, shape: Shape | None = None) -> dict[Axis, int]:
        """The length of each axis, for the config's own shape or for another one."""
        shape = shape or self.shape(config)
        within = head_dim(config)
        return {
            HIDDEN: shape.hidden,
            Q: shape.kv_heads * group_size(config) * within,
            KV: shape.kv_heads * within,
            NEURON: shape.neurons,
            VOCAB: config.vocab_size,
            WITHIN_HEAD: within,
        }

    def parameters(self, config: PretrainedConfig, shape: Shape, present: Sequence[str]) -> int:
        """The parameter count at `shape`.

        Args:
            present: the names of the parameters that a model of this config has, those shared once.
        """
        sizes = self.sizes(config, shape)
        total = 0
        for name in present:
            _, layer, axes = self.match(name)
            if layer is None or layer == 0:
                total += math.prod(sizes[axis] for axis in axes) * (1 if layer is None else shape.layers)
        return total

    def config_at(
        self,
        config: PretrainedConfig,
        shape: Shape,
        kept_layers: Sequence[int] | None = None,
    ) -> PretrainedConfig:
        """The config of a model of another shape.

        Args:
            kept_layers: which of the old layers stay, where configs hold a list with an entry for each layer.
        Raises: ShapeError with the reason of the installed transformers, if it refuses the shape.
        """
        fields = copy.deepcopy(config.to_dict())
        fields |= {
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "num_key_value_heads": shape.kv_heads,
            "num_attention_heads": shape.kv_heads * group_size(config),
            "head_dim": head_dim(config),
            "intermediate_size": shape.neurons,
        }
        if fields.get("layer_types"):
            fields["layer_types"] = [fields["layer_types"][i] for i in kept_layers or range(shape.layers)]
        try:
            return type(config).from_dict(fields)
        except Exception as error:
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
            raise ShapeError(
                f"a {config.model_type} of {shape} is not possible: {''.join(reason).removeprefix('ValueError: ')}"
            ) from None


def head_dim(config: PretrainedConfig) -> int:
    """The length of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def group_size(config: PretrainedConfig) -> int:
    """How many query heads share one key-value head."""
    return config.num_attention_heads // config.num_key_value_heads


def with_fields(shape: Shape, **fields: int | None) -> Shape:
    """`shape` with those fields replaced that are not None."""
    return replace(shape, **{name: value for name, value in fields.items() if value is not None})
