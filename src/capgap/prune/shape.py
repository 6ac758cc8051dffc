"""From a parameter target to a shape that can be cut and that the installed transformers accepts."""

import math

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from capgap.anatomy import Anatomy, Shape
from capgap.errors import ShapeError
from capgap.models import quiet_transformers

TOLERANCE = 0.01


def solve_shape(
    anatomy: Anatomy, config: PretrainedConfig, target: int, *, layers: int | None = None, multiple: int = 1
) -> Shape:
    """The legal shape within 1 % of `target` parameters that cuts hidden size, heads and neurons most evenly.

    For each legal hidden size and number of key-value heads the neurons follow from the target; of these shapes
    the one is taken whose three kept shares differ least, as the paper cuts all three at one rate.

    Args:
        target: parameters, shared ones once.
        layers: how many layers stay; all of them where None.
        multiple: hidden size and neurons are multiples of this.
    Raises: ShapeError if the target is not smaller than the model, or no legal shape comes within 1 %.
    """
    full = anatomy.shape(config)
    names = parameter_names(config)
    if layers is not None and layers > full.layers:
        raise ShapeError(f"{layers} layers asked of a model that has {full.layers}; ask for at most {full.layers}")
    kept = layers or full.layers
    whole = anatomy.parameters(config, full, names)
    if target > whole:
        raise ShapeError(
            f"a student of {target:,} parameters cannot be cut from a model of {whole:,}; ask for less, "
            "or cut it from a larger member"
        )
    found: list[tuple[float, Shape]] = []
    for kv_heads in range(1, full.kv_heads + 1):
        for hidden in range(multiple, full.hidden + 1, multiple):
            base = anatomy.parameters(config, Shape(kept, hidden, kv_heads, 0), names)
            slope = anatomy.parameters(config, Shape(kept, hidden, kv_heads, 1), names) - base
            neurons = min(full.neurons, max(multiple, round((target - base) / slope / multiple) * multiple))
            if abs(base + slope * neurons - target) > TOLERANCE * target:
                continue
            shares = (hidden / full.hidden, kv_heads / full.kv_heads, neurons / full.neurons)
            logs = [math.log(share) for share in shares]
            found.append((max(logs) - min(logs), Shape(kept, hidden, kv_heads, neurons)))
    for _, shape in sorted(found, key=lambda pair: (pair[0], -pair[1].hidden)):
        try:
            anatomy.config_at(config, shape)
        except ShapeError:
            continue
        return shape
    raise ShapeError(
        f"no legal shape with {kept} layers comes within 1 % of {target:,} parameters when cut from {full} "
        f"({whole:,}); try another size or number of layers"
    )


def parameter_names(config: PretrainedConfig) -> list[str]:
    """The parameters that a model of this config has, each shared one once; no weights are made."""
    with torch.device("meta"), quiet_transformers():
        return [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
