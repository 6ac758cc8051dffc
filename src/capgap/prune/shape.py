"""From a parameter target to a shape that can be cut and that the installed transformers accepts."""

import functools
import json
from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from capgap.anatomy import Anatomy, Shape
from capgap.errors import ShapeError
from capgap.models import quiet_transformers

TOLERANCE = 0.01


def solve_shape(
    anatomy: Anatomy, target: int, *, layers: int | None = None, experts: int | None = None, multiple: int = 1
) -> Shape:
    """The legal shape within 1 % of `target` parameters that cuts hidden size, heads and neurons most evenly.

    For each hidden size and number of key-value heads the neurons follow from the target; of these shapes the one
    is taken whose three kept shares differ least, as the paper cuts all three at one rate, and which the installed
    transformers accepts.

    Args:
        target: parameters, shared ones once.
        layers: how many layers stay; all of them where None.
        experts: how many experts of a layer stay; all of them where None.
        multiple: hidden size and neurons are multiples of this.
    Raises: ShapeError if the target is not smaller than the model, or no legal shape comes within 1 %.
    """
    full = anatomy.shape
    names = parameter_names(anatomy.config)
    for word, asked, there in (("layers", layers, full.layers), ("experts", experts, full.experts)):
        if asked is not None and asked > (there or 0):
            raise ShapeError(
                f"{asked} {word} asked of a model that has {there or 'none'}; ask for at most {there or 'none'}"
            )
    kept, whole = layers or full.layers, anatomy.parameters(full, names)
    if target > whole:
        raise ShapeError(
            f"a student of {target:,} parameters cannot be cut from a model of {whole:,}; ask for less, "
            "or cut it from a larger member"
        )
    for shape in _even_first(anatomy, names, target, kept, experts or full.experts, multiple):
        try:
            anatomy.config_at(shape, range(shape.layers))
        except ShapeError:
            continue
        return shape
    raise ShapeError(
        f"no legal shape with {kept} layers comes within 1 % of {target:,} parameters when cut from {full} "
        f"({whole:,}); try another size or number of layers"
    )


def _even_first(
    anatomy: Anatomy, names: list[str], target: int, layers: int, experts: int | None, multiple: int
) -> Iterator[Shape]:
    """Shapes within the tolerance, whether legal or not, by how far their kept shares are apart."""
    full = anatomy.shape
    kv_heads = np.arange(1, full.kv_heads + 1)
    if anatomy.hidden_of(1) is None:
        hidden = np.arange(multiple, full.hidden + 1, multiple)
        kv_heads, hidden = (axis.ravel() for axis in np.meshgrid(kv_heads, hidden, indexing="ij"))
    else:
        hidden = np.array([anatomy.hidden_of(int(heads)) for heads in kv_heads])
    # Of arrays, which a Shape's sizes may be; the count is linear in the neurons.
    base = anatomy.parameters(_shapes(layers, hidden, kv_heads, 0, experts), names)
    slope = anatomy.parameters(_shapes(layers, hidden, kv_heads, 1, experts), names) - base
    neurons = np.clip(np.rint((target - base) / slope / multiple) * multiple, multiple, full.neurons).astype(np.int64)
    close = np.abs(base + slope * neurons - target) <= TOLERANCE * target
    kv_heads, hidden, neurons = kv_heads[close], hidden[close], neurons[close]
    logs = np.log(np.stack([hidden / full.hidden, kv_heads / full.kv_heads, neurons / full.neurons]))
    apart = np.round(logs.max(0) - logs.min(0), 12)
    for i in np.lexsort((-hidden, apart)):
        yield Shape(layers, int(hidden[i]), int(kv_heads[i]), int(neurons[i]), experts)


def _shapes(layers: int, hidden: np.ndarray, kv_heads: np.ndarray, neurons: int, experts: int | None) -> Shape:
    return Shape(layers, hidden, kv_heads, neurons, experts)  # pyright: ignore[reportArgumentType]


def parameter_names(config: PretrainedConfig) -> list[str]:
    """The parameters that a model of this config has, each shared one once; no weights are made."""
    return list(_names(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str)))


@functools.lru_cache(maxsize=64)
def _names(kind: type[PretrainedConfig], text: str) -> tuple[str, ...]:
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(text)))
        return tuple(name for name, _ in model.named_parameters())
