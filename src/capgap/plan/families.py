"""Model families: their members' exact sizes and the configurations these follow from."""

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator
from transformers import AutoConfig, PreTrainedConfig

from capgap.errors import RecipeError
from capgap.recipe import Count, Section, check

_FOLDER = resources.files("capgap.plan") / "families"


class Member(Section):
    """One published model of a family.

    Attributes:
        name: how a recipe names it, such as 7b.
        hub: where its weights are, on the Hugging Face hub.
        parameters: exact, shared weights counted once.
        trained_on: tokens of its pretraining, as its makers state them; None where they do not.
        note: what whoever picks it should know, if anything.
        config: the configuration's fields that its size depends on, beside the family's.
    """

    name: str
    hub: str
    parameters: Annotated[int, Field(gt=0)]
    trained_on: Count | None = None
    note: str = ""
    config: dict[str, Any]


class Family(Section):
    """Models of several sizes that share one tokenizer, smallest first.

    Attributes:
        name: how a recipe names it.
        model_type: its architecture, as transformers calls it.
        source: where the sizes are published.
        config: configuration fields that all members share.
        members: ascending in parameters.
    """

    name: str
    model_type: str
    source: str
    config: dict[str, Any]
    members: Annotated[tuple[Member, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> "Family":
        sizes = [m.parameters for m in self.members]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"members must be in ascending order of parameters; found {sizes}")
        return self

    def config_of(self, member: Member) -> PreTrainedConfig:
        """The member's configuration, enough to count its cost; not the one to load its weights with."""
        return AutoConfig.for_model(self.model_type, **self.config, **member.config)

    def vocabulary_of(self, member: Member) -> int:
        """Rows of a member's token table; members may pad one tokenizer's vocabulary differently."""
        return self.config_of(member).vocab_size

    def member(self, name: str) -> Member:
        """The member of that name or hub id, in any case. Raises RecipeError that lists the names."""
        for member in self.members:
            if name.strip().lower() in (member.name.lower(), member.hub.lower()):
                return member
        known = ", ".join(m.name for m in self.members)
        raise RecipeError(f"family {self.name} has no member {name!r}; its members are {known}")


def nearest(members: Sequence[Member], parameters: float) -> Member:
    """The member nearest to a scale, by factor."""
    return min(members, key=lambda member: abs(math.log(member.parameters / parameters)))


def family_names() -> tuple[str, ...]:
    """The names of all families, in alphabetical order."""
    return tuple(sorted(f.name.removesuffix(".yaml") for f in _FOLDER.iterdir() if f.name.endswith(".yaml")))


@lru_cache(maxsize=32)
def load_family(name: str) -> Family:
    """The family of that name, in any case. Raises RecipeError that lists the names."""
    wanted = name.strip().lower()
    if wanted not in family_names():
        raise RecipeError(f"family {name!r} is not known; known are {', '.join(family_names())}")
    file = _FOLDER / f"{wanted}.yaml"
    return check(yaml.safe_load(file.read_text(encoding="utf-8")), Family, file.name)
