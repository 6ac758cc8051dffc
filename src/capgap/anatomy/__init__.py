"""Which axis of which weight is hidden, key-value group, neuron or vocabulary, for each architecture."""

from capgap.anatomy.axes import HIDDEN, KV, NEURON, VOCAB, WITHIN_HEAD, Anatomy, Q, Shape, Weight
from capgap.anatomy.llama import LLAMA
from capgap.anatomy.registry import anatomy_of, known_model_types

__all__ = [
    "HIDDEN",
    "KV",
    "LLAMA",
    "NEURON",
    "VOCAB",
    "WITHIN_HEAD",
    "Anatomy",
    "Q",
    "Shape",
    "Weight",
    "anatomy_of",
    "known_model_types",
]
