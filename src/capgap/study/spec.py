"""What a study is, as its YAML file says it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig

from capgap.recipe import Count, Cut, Data, Evaluate, ModelRef, Prune, Section, Train

TEACHER, ALL, RANDOM, NONE = "teacher", "all", "random", "none"


class Budget(Section):
    """Tokens of a run: a count, or so many for each of the student's parameters."""

    tokens: Count | None = None
    per_parameter: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _given(self) -> "Budget":
        if (self.tokens is None) == (self.per_parameter is None):
            raise ValueError("a budget is tokens (3M) or tokens per parameter (30x)")
        return self

    def of(self, scale: int, step: int) -> int:
        """Tokens for a student of `scale` parameters, in whole steps of `step` tokens."""
        tokens = self.tokens or (self.per_parameter or 0) * scale
        return max(1, round(tokens / step)) * step


def parse_budget(value: Any) -> Any:
    """The fields of a Budget from 3M (tokens) or 30x (tokens per parameter). Raises ValueError."""
    if isinstance(value, dict | Budget):
        return value
    if isinstance(value, str) and value.strip().lower().endswith("x"):
        try:
            return {"per_parameter": float(value.strip()[:-1])}
        except ValueError:
            raise ValueError(f"{value!r} is not a budget; write tokens (3M) or tokens per parameter (30x)") from None
    return {"tokens": value}


Budgets = list[Annotated[Budget, BeforeValidator(parse_budget)]]


class Member(Section):
    """A nano model: its width, its peak learning rate."""

    hidden: Count
    neurons: Count
    lr: Annotated[float, Field(gt=0)]


class Nano(Section):
    """A family of small models that the study pretrains itself, with a tokenizer trained on its own text."""

    architecture: Literal["llama", "gpt_neox"] = "llama"
    vocabulary: Annotated[Count, Field(ge=300)] = 1024
    layers: Count = 2
    head_dim: Count = 16
    members: Annotated[list[Member], Field(min_length=1)]
    pretrain: Train

    def config(self, member: Member, block: int) -> PretrainedConfig:
        """The Hugging Face config of a member; one key-value head for each query head; token table and head shared."""
        heads = max(1, member.hidden // self.head_dim)
        common: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": member.hidden,
            "intermediate_size": member.neurons,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "tie_word_embeddings": True,
            "max_position_embeddings": max(block, 128),
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if self.architecture == "gpt_neox":
            return GPTNeoXConfig(**common)
        return LlamaConfig(**common, num_key_value_heads=heads, head_dim=self.head_dim)

    @model_validator(mode="after")
    def _heads(self) -> "Nano":
        for index, member in enumerate(self.members):
            heads = max(1, member.hidden // self.head_dim)
            if member.hidden % heads or (self.architecture == "gpt_neox" and member.hidden % self.head_dim):
                what = f"head_dim = {self.head_dim}" if self.architecture == "gpt_neox" else f"its {heads} heads"
                raise ValueError(f"members.{index}.hidden = {member.hidden} must be a multiple of {what}")
        return self


class StudentSize(Cut):
    """A student of the study: a scale, or a shape that is the same whatever it is cut from."""

    name: Annotated[str | None, Field(pattern=r"^\w[\w.]*$")] = None


class Race(Section):
    """Teachers that can no longer win are stopped early; `true` stands for one with what is left out here.

    Its heats are the budgets: a teacher is stopped between two of them.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.4
    tolerance: Annotated[float, Field(ge=0)] = 0.005


def parse_race(value: Any) -> Any:
    """The fields of a Race from true, None from false."""
    return ({} if value else None) if isinstance(value, bool) else value


class Grid(Section):
    """Trials: each of some students, cut from each of some models, taught by each of some teachers.

    `starts` holds names of models, `teacher` (the one that teaches: the paper's way), `all` and `random` (random
    weights); `teachers` names, `all` and `none` (cross-entropy alone). What is left out is the study's own.
    """

    condition: Annotated[str, Field(pattern=r"^(\w[\w.-]*)?$")] = ""
    students: list[Annotated[int, Field(ge=0)]] | None = None
    starts: Annotated[list[str], Field(min_length=1)] = Field(default=[TEACHER])
    teachers: Annotated[list[str], Field(min_length=1)] = Field(default=[ALL])
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    tokens: Annotated[Budgets, Field(min_length=1)] | None = None
    distill: dict[str, Any] = Field(default={})
    prune: dict[str, Any] = Field(default={})
    race: Annotated[Race | None, BeforeValidator(parse_race)] = None


def _all_alike(prune: Prune) -> Prune:
    """Trials must differ in what is studied only: `auto`, which repairs some students and not others, repairs none."""
    return prune.model_copy(update={"repair": "none"}) if prune.repair == "auto" else prune


class StudySpec(Section):
    """A study: the teachers, the students, the seeds and budgets, and how the students are trained.

    The teachers are a nano family that the study pretrains itself, or pretrained models of one vocabulary. Without
    `grids`, each student is cut from, and taught by, each larger model, as in the paper. A worker trains up to
    `side_by_side` students of one teacher and seed in one pass of the teacher; each comes out as if trained alone.
    """

    name: Annotated[str | None, Field(pattern=r"^\w[\w.-]*$")] = None
    data: Data
    nano: Nano | None = None
    teachers: list[ModelRef] = Field(default=[])
    students: Annotated[list[StudentSize], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default=[0])
    tokens: Budgets = Field(default=[])
    grids: Annotated[list[Grid], Field(min_length=1)] = Field(default=[Grid()])
    prune: Annotated[Prune, AfterValidator(_all_alike)] = Prune(repair="none")
    distill: Train
    evaluate: Evaluate = Evaluate()
    side_by_side: Count = 1
    train_tokens: Count | None = None
    retries: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="before")
    @classmethod
    def _tokens_once(cls, tree: Any) -> Any:
        """`tokens` beside `distill` takes the place of `distill.tokens`."""
        if not isinstance(tree, dict) or not tree.get("tokens") or not isinstance(tree.get("distill"), dict):
            return tree
        step = tree["distill"].get("tokens_per_step", Train.model_fields["tokens_per_step"].default)
        return {**tree, "distill": {"tokens": step, **tree["distill"]}}

    @model_validator(mode="after")
    def _consistent(self) -> "StudySpec":
        if (self.nano is None) == (not self.teachers):
            raise ValueError("give either nano, a family to pretrain, or teachers, models that are pretrained")
        if self.nano is None and self.data.tokenizer is None:
            raise ValueError("data.tokenizer is missing; give the folder or name of the teachers' tokenizer")
        for i, grid in enumerate(self.grids):
            for index in grid.students or ():
                if index >= len(self.students):
                    raise ValueError(f"grids.{i}.students = {index}: there are {len(self.students)}, counted from 0")
        return self

    def budgets(self, grid: Grid) -> Sequence[Budget]:
        """The budgets of a grid: its own, the study's, or the one of `distill`."""
        return grid.tokens or self.tokens or [Budget(tokens=self.distill.tokens)]
