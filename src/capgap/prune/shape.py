"""From a parameter target to a shape that can be cut and that the installed transformers accepts."""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from transformers import PretrainedConfig

from capgap.anatomy import Anatomy, Shape
from capgap.errors import ShapeError
from capgap.models import bare_model

TOLERANCE = 0.01
Preference = Literal["width", "depth", "even"]
Limits = Mapping[str, tuple[int, int]]


def solve_shape(
    anatomy: Anatomy,
    target: int,
    *,
    layers: int | None = None,
    experts: int | None = None,
    multiple: int = 1,
    prefer: Preference = "width",
    limits: Limits | None = None,
) -> Shape:
    """The legal shape within 1 % of `target` parameters that cuts hidden size, heads and neurons most evenly.

    For each hidden size and number of key-value heads the neurons follow from the target; of these shapes the one
    is taken whose three kept shares differ least, as the paper cuts all three at one rate, and which the installed
    transformers accepts.

    Args:
        target: parameters, shared ones once.
        layers: how many layers stay; as `prefer` says where None.
        experts: how many experts of a layer stay; all of them where None.
        multiple: hidden size and neurons are multiples of this.
        prefer: `width` keeps all layers and drops some only where no shape with all of them is possible; `depth`
            drops as many layers as it can; `even` cuts layers at the rate of the widths.
        limits: lowest and highest layers, hidden, kv_heads or neurons.
    Raises: ShapeError if the target is not smaller than the model, or no legal shape comes within 1 %.
    """
    for shape in _by_preference(anatomy, target, layers, experts, multiple, prefer, limits or {}):
        return shape
    what = f"{layers or 'any number of'} layers"
    within = "".join(f", {name} from {low} to {high}" for name, (low, high) in (limits or {}).items())
    raise ShapeError(
        f"no legal shape with {what}{within} comes within 1 % of {target:,} parameters when cut from {anatomy.shape} "
        f"({anatomy.parameters(anatomy.shape, parameter_names(anatomy.config)):,}); try another size or number of "
        "layers, or wider limits"
    )


def list_shapes(
    anatomy: Anatomy,
    target: int,
    *,
    count: int,
    layers: int | None = None,
    experts: int | None = None,
    multiple: int = 1,
    prefer: Preference = "width",
    limits: Limits | None = None,
) -> list[Shape]:
    """Shapes of `target` parameters with different numbers of layers, from all kept to as few as possible.

    Args:
        count: how many at most: the one that `solve_shape` gives, and others evenly spread.
        layers, experts, multiple, prefer, limits: as for `solve_shape`.
    Raises: ShapeError as `solve_shape` does.
    """
    first = solve_shape(
        anatomy, target, layers=layers, experts=experts, multiple=multiple, prefer=prefer, limits=limits
    )
    found = list(_by_preference(anatomy, target, layers, experts, multiple, "width", limits or {}))
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    spread = [found[place] for place in dict.fromkeys(places.tolist())]
    return [first, *[shape for shape in spread if shape.layers != first.layers]][:count]


def _by_preference(
    anatomy: Anatomy,
    target: int,
    layers: int | None,
    experts: int | None,
    multiple: int,
    prefer: Preference,
    limits: Limits,
) -> Iterator[Shape]:
    """For each number of layers its evenest legal shape, the preferred number first."""
    full = anatomy.shape
    names = parameter_names(anatomy.config)
    for word, asked, there in (("layers", layers, full.layers), ("experts", experts, full.experts)):
        if asked is not None and asked > (there or 0):
            raise ShapeError(
                f"{asked} {word} asked of a model that has {there or 'none'}; ask for at most {there or 'none'}"
            )
    whole = anatomy.parameters(full, names)
    if target > whole:
        raise ShapeError(
            f"a student of {target:,} parameters cannot be cut from a model of {whole:,}; ask for less, "
            "or cut it from a larger member"
        )
    low, high = (layers, layers) if layers else limits.get("layers", (1, full.layers))
    counts = list(range(min(high, full.layers), low - 1, -1))

    def shapes(count: int) -> Iterator[Shape]:
        return _even_first(anatomy, names, target, count, experts or full.experts, multiple, limits)

    if prefer == "depth":
        counts.reverse()
    if prefer == "even":
        evenest = {n: next(shapes(n), None) for n in counts}
        counts = sorted((n for n in counts if evenest[n]), key=lambda n: _unevenness(evenest[n], full))
    for count in counts:
        for shape in shapes(count):
            try:
                anatomy.config_at(shape, range(shape.layers))
            except ShapeError:
                continue
            yield shape
            break


def _unevenness(shape: Shape | None, full: Shape) -> float:
    """How far the kept share of layers is from those of the widths."""
    assert shape is not None
    widths = [shape.hidden / full.hidden, shape.kv_heads / full.kv_heads, shape.neurons / full.neurons]
    return abs(math.log(shape.layers / full.layers) - sum(map(math.log, widths)) / 3)


def _even_first(
    anatomy: Anatomy,
    names: list[str],
    target: int,
    layers: int,
    experts: int | None,
    multiple: int,
    limits: Limits,
) -> Iterator[Shape]:
    """Shapes within the tolerance, whether legal or not, by how far their kept shares are apart."""
    full = anatomy.shape

    def within(name: str, there: int) -> tuple[int, int]:
        low, high = limits.get(name, (1, there))
        return low, min(high, there)

    low, high = within("kv_heads", full.kv_heads)
    kv_heads = np.arange(low, high + 1)
    low, high = within("hidden", full.hidden)
    if anatomy.hidden_of(1) is None:
        hidden = np.arange(-(-low // multiple) * multiple, high + 1, multiple)
        kv_heads, hidden = (axis.ravel() for axis in np.meshgrid(kv_heads, hidden, indexing="ij"))
    else:
        hidden = np.array([anatomy.hidden_of(int(heads)) for heads in kv_heads])
        kv_heads, hidden = (axis[(hidden >= low) & (hidden <= high)] for axis in (kv_heads, hidden))
    # Of arrays, which a Shape's sizes may be; the count is linear in the neurons.
    base = anatomy.parameters(_shapes(layers, hidden, kv_heads, 0, experts), names)
    slope = anatomy.parameters(_shapes(layers, hidden, kv_heads, 1, experts), names) - base
    low, high = within("neurons", full.neurons)
    low, high = -(-low // multiple) * multiple, high if high == full.neurons else high // multiple * multiple
    wanted = np.rint((target - base) / slope / multiple) * multiple
    neurons = np.clip(wanted, low, high).astype(np.int64)
    close = (np.abs(base + slope * neurons - target) <= TOLERANCE * target) & (low <= high)
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
    model = bare_model(kind.from_dict(json.loads(text)))
    return tuple(name for name, _ in model.named_parameters())
