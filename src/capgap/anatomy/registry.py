"""Finds the table of a model."""

from transformers import PretrainedConfig

from capgap.anatomy.axes import Anatomy
from capgap.anatomy.llama import LLAMA
from capgap.errors import ModelError

_TABLES = (LLAMA,)


def known_model_types() -> tuple[str, ...]:
    """The Hugging Face model types that capgap can cut."""
    return tuple(name for table in _TABLES for name in table.model_types)


def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """The table of this model's type. Raises ModelError that lists the types there are tables for."""
    for table in _TABLES:
        if config.model_type in table.model_types:
            return table
    raise ModelError(
        f"no anatomy for the model type {config.model_type!r}; capgap can cut {', '.join(known_model_types())}"
    )
