"""Which axis of which weight is hidden, key-value group, neuron, expert or vocabulary, for each architecture."""

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
    Fields,
    Grouped,
    Q,
    Shape,
    Stacked,
    Table,
    Weight,
    with_fields,
)
from capgap.anatomy.registry import anatomy_of, known_model_types, known_tables, register
from capgap.anatomy.sizes import Anatomy, length

__all__ = [
    "EXPERT",
    "HIDDEN",
    "KV",
    "NEURON",
    "POSITION",
    "VOCAB",
    "WITHIN_HEAD",
    "Anatomy",
    "Axis",
    "Dimension",
    "Fields",
    "Grouped",
    "Q",
    "Shape",
    "Stacked",
    "Table",
    "Weight",
    "anatomy_of",
    "known_model_types",
    "known_tables",
    "length",
    "register",
    "with_fields",
]
