"""Finds the table of a model."""

from transformers import PretrainedConfig

from capgap.anatomy.axes import Table
from capgap.anatomy.experts import MIXTRAL, QWEN3_MOE
from capgap.anatomy.fused import FALCON, GPT2, GPT_NEOX, PHI3, STARCODER2
from capgap.anatomy.llama import GEMMA2, GEMMA3, LLAMA, OLMO2
from capgap.anatomy.sizes import Anatomy
from capgap.errors import ModelError

_tables: list[Table] = [
    LLAMA,
    GEMMA2,
    GEMMA3,
    OLMO2,
    GPT2,
    GPT_NEOX,
    PHI3,
    STARCODER2,
    FALCON,
    MIXTRAL,
    QWEN3_MOE,
]


def register(table: Table) -> None:
    """Makes an architecture known that capgap does not come with; a table before it of the same model type yields."""
    _tables.insert(0, table)


def known_tables() -> tuple[Table, ...]:
    """The tables there are, those that were registered last first."""
    return tuple(_tables)


def known_model_types() -> tuple[str, ...]:
    """The Hugging Face model types that capgap can cut."""
    return tuple(dict.fromkeys(name for table in _tables for name in table.model_types))


def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """The anatomy of this model. Raises ModelError that lists the types there are tables for."""
    for table in _tables:
        if config.model_type in table.model_types:
            return Anatomy(table, config)
    raise ModelError(
        f"no anatomy for the model type {config.model_type!r}; capgap can cut {', '.join(known_model_types())}; "
        "docs/anatomies.md tells how to write the table of another"
    )
