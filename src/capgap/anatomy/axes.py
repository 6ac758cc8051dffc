"""The words in which an architecture's table is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from capgap.errors import ModelError

Axis = Literal["hidden", "q", "kv", "neuron", "expert", "vocab", "position", "within_head"]
HIDDEN: Axis = "hidden"
Q: Axis = "q"  # query heads x head_dim, ordered by key-value group
KV: Axis = "kv"  # key-value heads x head_dim
NEURON: Axis = "neuron"
EXPERT: Axis = "expert"
VOCAB: Axis = "vocab"
POSITION: Axis = "position"
WITHIN_HEAD: Axis = "within_head"  # head_dim, the same for every head, never cut


@dataclass(frozen=True)
class Stacked:
    """One dimension that holds several axes one after the other, such as all queries, then all keys."""

    parts: tuple[Axis, ...]

    def __init__(self, *parts: Axis):
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Grouped:
    """One dimension that holds, for each key-value group in turn, that group's part of several axes."""

    parts: tuple[Axis, ...]

    def __init__(self, *parts: Axis):
        object.__setattr__(self, "parts", parts)


Dimension = Axis | Stacked | Grouped


@dataclass(frozen=True)
class Weight:
    """One row of a table: a module's `.weight`, dimension by dimension, and its `.bias`, if any.

    Attributes:
        transposed: stored [in, out] as GPT-2's Conv1D is, not [out, in] as Linear is; a bias has the out dimension.
        bare: the name is the parameter's own, with neither `.weight` nor `.bias` after it.
    """

    name: str
    axes: tuple[Dimension, ...]
    transposed: bool = False
    bare: bool = False

    def __init__(self, name: str, *axes: Dimension, transposed: bool = False, bare: bool = False):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "transposed", transposed)
        object.__setattr__(self, "bare", bare)

    @property
    def bias(self) -> tuple[Dimension, ...]:
        """The axes of the bias."""
        return self.axes[-1:] if self.transposed else self.axes[:1]


@dataclass(frozen=True)
class Shape:
    """What is free when a student is cut: layers, hidden size, key-value heads, FFN neurons of a layer (of an expert,
    where there are experts), and experts of a layer (None in a dense model)."""

    layers: int
    hidden: int
    kv_heads: int
    neurons: int
    experts: int | None = None

    def __str__(self) -> str:
        text = f"{self.layers} layers, hidden {self.hidden}, {self.kv_heads} key-value heads, {self.neurons} neurons"
        return text if self.experts is None else f"{text}, {self.experts} experts"


@dataclass(frozen=True)
class Fields:
    """What an architecture's config calls its sizes. None: it has no such field.

    Attributes:
        kv_heads: None where every query head has its own.
        head_dim: None where heads are bound: hidden size = query heads x head size, and a cut keeps the head size.
        by_layer: lists with an entry for each layer.
        fixed: values that the table holds for; other values are another architecture.
    """

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    neurons: str = "intermediate_size"
    experts: str | None = None
    by_layer: tuple[str, ...] = ("layer_types",)
    fixed: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """An architecture's weights.

    Attributes:
        model_types: Hugging Face model types it holds for.
        trunk: the weights outside the layers.
        layers_at: the name of the module list of layers.
        layer: the weights of one layer.
        masks: for each axis that can be cut, the rows whose *reading* side the pruning mask sits on. A norm
            stands for all that read its output.
        fields: what the config calls its sizes.
        embedding: the row of the token embedding.
        norm_offset: a norm multiplies by this plus its weight.
        scaled_embedding: embeddings are multiplied by the square root of the hidden size.
        final_norm: the row of the norm that the head reads.
    """

    model_types: tuple[str, ...]
    trunk: tuple[Weight, ...]
    layers_at: str
    layer: tuple[Weight, ...]
    masks: Mapping[Axis, tuple[str, ...]]
    fields: Fields = Fields()
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    norm_offset: float = 0.0
    scaled_embedding: bool = False

    def match(self, parameter: str) -> tuple[Weight, int | None, tuple[Dimension, ...]]:
        """The one row of a parameter's name, its layer (None in the trunk), and the parameter's axes.

        Raises: ModelError if not exactly one row matches.
        """
        inside = re.fullmatch(re.escape(self.layers_at) + r"\.(\d+)\.(.+)", parameter)
        rows, name = (self.layer, inside[2]) if inside else (self.trunk, parameter)
        module, _, kind = name.rpartition(".")
        found = [row for row in rows if (row.bare and row.name == name) or (not row.bare and row.name == module)]
        if len(found) != 1 or not (found[0].bare or kind in ("weight", "bias")):
            raise ModelError(f"parameter {parameter} matches {len(found)} rows of the {self.model_types[0]} anatomy")
        axes = found[0].bias if kind == "bias" and not found[0].bare else found[0].axes
        return found[0], int(inside[1]) if inside else None, axes

    def row(self, name: str) -> Weight:
        """The row of that name. Raises ModelError if there is none."""
        for row in (*self.trunk, *self.layer):
            if row.name == name:
                return row
        raise ModelError(f"the {self.model_types[0]} anatomy has no row {name}")


def with_fields(shape: Shape, **fields: int | None) -> Shape:
    """`shape` with those fields replaced that are not None."""
    return replace(shape, **{name: value for name, value in fields.items() if value is not None})
