"""Recipes: what a run is made of, read from YAML and checked before anything starts.

Every key that is not known, every value of a wrong type and every impossible value is a RecipeError that names
the file and the key. Counts may be written as 3B, 126M, 4k; fractions of the model that is cut as 0.4x.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from capgap.errors import RecipeError
from capgap.files import hash_of

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(value: Any) -> int:
    """A count from a number or from text such as 3B, 126M, 4k, 1.5e9. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a count; write a whole number, or 4k, 126M, 3B")
    match = re.fullmatch(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([kmbt]?)\s*", str(value).lower())
    if not match:
        raise ValueError(f"{value!r} is not a count; write a positive whole number, or 4k, 126M, 3B")
    number = float(match[1].replace("_", "").replace(",", "")) * _SUFFIX[match[2]]
    if number < 1 or abs(number - round(number)) > 1e-6 * number:
        raise ValueError(f"{value!r} is not a whole number of at least 1")
    return round(number)


def parse_scale(value: Any) -> int | float:
    """A student's scale: a count of parameters (int), or a fraction such as 0.4x (float between 0 and 1)."""
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, str) and value.strip().lower().endswith("x"):
        text = value.strip()[:-1]
        try:
            fraction = float(text)
        except ValueError:
            raise ValueError(f"{value!r} is not a scale; write a count (3B) or a fraction (0.4x)") from None
        if not 0 < fraction <= 1:
            raise ValueError(f"{value!r} must lie between 0x and 1x: a student is cut from a larger model")
        return fraction
    return parse_count(value)


def parse_warmup(value: Any) -> float:
    """A share of the steps (below 1), or a count of tokens. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    try:
        return float(parse_count(value))
    except ValueError:
        raise ValueError(f"{value!r} is neither a share of the steps from 0 to 1 nor a count of tokens") from None


Count = Annotated[int, BeforeValidator(parse_count)]
Warmup = Annotated[float, BeforeValidator(parse_warmup)]
Scale = Annotated[int | float, BeforeValidator(parse_scale)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class FamilyPick(Section):
    """A member of a known family: the one the law picks, or the one named."""

    family: str
    pick: str = "law"


ModelRef = str | FamilyPick


class Mixed(Section):
    """One of several teachers, and its weight in the mixture of their distributions."""

    model: ModelRef
    weight: Annotated[float, Field(gt=0)] = 1.0


class Source(Section):
    """One text source: exactly one of python_stdlib, text, jsonl, parquet, dataset."""

    python_stdlib: bool = False
    text: str | None = None
    jsonl: str | None = None
    parquet: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = True
    field: str = "text"
    weight: Annotated[float, Field(gt=0)] = 1.0
    documents: Literal["file", "blank-line"] = "file"
    part: Annotated[str | None, Field(pattern=r"^(train|held-out)$")] = None

    @property
    def kind(self) -> str:
        return next(k for k in ("python_stdlib", "text", "jsonl", "parquet", "dataset") if getattr(self, k))

    @model_validator(mode="after")
    def _one_kind(self) -> "Source":
        kinds = [k for k in ("python_stdlib", "text", "jsonl", "parquet", "dataset") if getattr(self, k)]
        if len(kinds) != 1:
            raise ValueError(
                "name exactly one of python_stdlib, text, jsonl, parquet, dataset; found "
                + (" and ".join(kinds) or "none")
            )
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


Sources = Annotated[list[Source], BeforeValidator(_as_list), Field(min_length=1)]


class Data(Section):
    """Training and held-out text, and how it is packed."""

    train: Sources
    held_out: Sources
    block: Annotated[Count, Field(ge=8)] = 4096
    separator: str | None = None
    score_separators: bool = True
    tokenizer: str | None = None


def parse_range(value: Any) -> tuple[int, int]:
    """The lowest and the highest of something. Raises ValueError."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{value!r} must be the lowest and the highest, such as [16, 32]")
    low, high = map(parse_count, value)
    if low > high:
        raise ValueError(f"{value!r} must name the lowest first")
    return low, high


Range = Annotated[tuple[int, int], BeforeValidator(parse_range)]


class Limits(Section):
    """The lowest and the highest of each size that is looked at when a shape is solved for."""

    layers: Range | None = None
    hidden: Range | None = None
    kv_heads: Range | None = None
    neurons: Range | None = None

    def given(self) -> dict[str, Range]:
        """Those that there are."""
        return {name: limits for name, limits in self if limits is not None}


class Cut(Section):
    """What a cut makes: a scale (with the layers and experts kept), or an explicit shape."""

    scale: Scale | None = None
    layers: Count | None = None
    hidden: Count | None = None
    kv_heads: Count | None = None
    neurons: Count | None = None
    experts: Count | None = None
    prefer: Literal["width", "depth", "even"] = "width"
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _scale_or_shape(self) -> Self:
        shape = [name for name in ("hidden", "kv_heads", "neurons") if getattr(self, name) is not None]
        if self.scale is not None and shape:
            raise ValueError(f"give a scale or an explicit shape, not both; found scale and {', '.join(shape)}")
        if self.scale is None and not shape and self.layers is None and self.experts is None:
            raise ValueError("give a scale (3B, 0.4x) or a shape (layers, hidden, kv_heads, neurons, experts)")
        return self


class Stop(Cut):
    """A larger student on the way, distilled before it is cut again."""

    tokens: Count | None = None


class Student(Cut):
    """The student: its scale or shape, the model it is cut from, and larger students on the way."""

    name: Annotated[str | None, Field(pattern=r"^\w[\w.-]*$")] = None
    start: Annotated[ModelRef | None, Field(alias="from")] = None
    via: list[Stop] = Field(default=[])


Students = Annotated[list[Student], BeforeValidator(_as_list), Field(min_length=1)]


class Prune(Section):
    """How the student is cut out of the start."""

    score: Literal["auto", "expressiveness", "activation", "magnitude", "random"] = "auto"
    calibration_tokens: Count = 524_288
    calibration_batch: Count = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    offload: bool = False
    layers: Literal["symmetric", "even", "influence", "contiguous", "loss", "block_loss"] = "symmetric"
    repair: Literal["auto", "none", "norms", "outputs", "all"] = "auto"
    repair_tokens: Count = 65_536
    seed: Annotated[int, Field(ge=0)] = 0


_HOW_IT_IS_RUN = (
    "micro_batch_tokens",
    "chunk_tokens",
    "parallel",
    "shard_size",
    "teacher_offload",
    "activation_checkpointing",
    "compile",
    "checkpoint_every",
    "keep_checkpoints",
    "async_checkpoints",
    "log_every",
    "trackers",
)


class Train(Section):
    """The training loop's settings; with a teacher it distils, without one it pretrains."""

    tokens: Count
    tokens_per_step: Count = 4_000_000
    micro_batch_tokens: Count | None = None
    kd_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"] = (
        "forward_kl"
    )
    mix: Annotated[float | None, Field(gt=0, lt=1)] = None
    hidden_loss: Literal["mse", "cosine"] | None = None
    hidden_weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    lr: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: Warmup = 0.01
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    chunk_tokens: Count | None = None
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: Count | None = None
    teacher_offload: bool = False
    activation_checkpointing: bool = False
    compile: bool | Literal["auto"] = "auto"
    max_skipped: Annotated[int, Field(ge=0)] = 5
    checkpoint_every: Annotated[float, Field(gt=0)] = 600.0
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    async_checkpoints: bool = False
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=[])
    log_every: Count = 50
    evaluations: Annotated[int, Field(ge=1)] = 10

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights, but for rounding; not how it is run, kept and watched."""
        return self.model_dump(mode="json", exclude=set(_HOW_IT_IS_RUN))

    @model_validator(mode="after")
    def _mix(self) -> "Train":
        if self.mix is not None and self.divergence not in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
            raise ValueError(
                f"mix = {self.mix} is read by jsd and the skewed KLs only; divergence is {self.divergence}"
            )
        if self.shard_size is not None and self.parallel != "hsdp":
            raise ValueError(f"shard_size = {self.shard_size} is read with parallel = hsdp only; it is {self.parallel}")
        return self

    @model_validator(mode="after")
    def _steps(self) -> "Train":
        if self.tokens < self.tokens_per_step:
            raise ValueError(
                f"tokens = {self.tokens} is less than one step, tokens_per_step = {self.tokens_per_step}; "
                "give more tokens or a smaller step"
            )
        return self


class Cache(Section):
    """What is stored of the teacher, so that students train without it."""

    kind: Literal["sampled", "topk", "dense"] = "sampled"
    k: Annotated[Count, Field(le=65_535)] = 64
    seed: Annotated[int, Field(ge=0)] = 0
    shard_tokens: Count | None = None
    folder: str | None = None


class Evaluate(Section):
    """How much held-out text is scored."""

    tokens: Count = 2_000_000


class Recipe(Section):
    """The whole way of a student, or of several side by side: plan, prune, distil, evaluate."""

    teacher: ModelRef | Annotated[list[Mixed], Field(min_length=1)]
    student: Students
    data: Data
    prune: Prune = Prune()
    cache: Cache | None = None
    distill: Train
    evaluate: Evaluate = Evaluate()
    output: str

    def teachers(self) -> list[Mixed]:
        """The models that are learnt from; of a single one the weight is 1."""
        return self.teacher if isinstance(self.teacher, list) else [Mixed(model=self.teacher)]

    @model_validator(mode="after")
    def _sparse_cache(self) -> "Recipe":
        if self.cache is not None and self.cache.kind != "dense" and self.distill.divergence != "forward_kl":
            raise ValueError(
                f"distill.divergence = {self.distill.divergence} needs the teacher's whole distribution, of which "
                f"cache.kind = {self.cache.kind} keeps a part; set cache.kind = dense, or leave out cache"
            )
        return self

    @model_validator(mode="after")
    def _hidden_loss(self) -> "Recipe":
        if self.distill.hidden_loss is not None and (self.cache is not None or len(self.teachers()) > 1):
            found = "several teachers" if self.cache is None else "cache"
            raise ValueError(
                f"distill.hidden_loss = {self.distill.hidden_loss} needs one teacher beside the student; found {found}"
            )
        return self

    @model_validator(mode="after")
    def _several(self) -> "Recipe":
        starts = [student.start for student in self.student]
        picks = [p for p in (*starts, *(t.model for t in self.teachers())) if isinstance(p, FamilyPick)]
        if len(self.student) > 1 and any(pick.pick == "law" for pick in picks):
            raise ValueError("pick = law picks for one student; for several, name the member, such as pick: 7b")
        return self

    def hash(self) -> str:
        """SHA-256 of the recipe, but for where its output goes."""
        return hash_of(self.model_dump(mode="json", exclude={"output"}))


class PretrainRecipe(Section):
    """A model trained without a teacher: its shape is the config.json of a folder, its weights start at random."""

    model: str
    data: Data
    train: Train
    evaluate: Evaluate = Evaluate()
    output: str


M = TypeVar("M", bound=BaseModel)


def load(path: Path, model: type[M], overrides: Sequence[str] = ()) -> M:
    """Reads a YAML file into `model`.

    Args:
        path: the file; ${NAME} in its values is replaced by the environment variable NAME.
        overrides: `key=value` with dotted keys (`distill.tokens=3M`, `data.train.0.weight=0.3`); the values
            are YAML.
    Raises: RecipeError that names the file and the key.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; give a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: must hold keys and values; found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return check(_expand(tree, str(path), ""), model, str(path))


def check(tree: Any, model: type[M], where: str) -> M:
    """Checks a tree of plain values against `model`. Raises RecipeError that names the key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {_explain(e, model, tree)}" for e in error.errors()[:8])) from None


def _explain(error: Any, model: type[BaseModel], tree: Any) -> str:
    key = ".".join(_as_written(error["loc"], tree))
    kind, found = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = ", ".join(_keys_at(model, error["loc"][:-1]))
        return f"{key}: unknown key" + (f"; known here: {known}" if known else "")
    if kind == "missing":
        return f"{key}: missing; it must be given"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if (kind == "value_error" and repr(found) in message) or isinstance(found, dict) else f" = {found!r}"
    return f"{key or 'the recipe'}{shown}: {message[:1].lower()}{message[1:]}"


def _as_written(loc: Sequence[int | str], tree: Any) -> list[str]:
    """The keys on pydantic's path that the tree holds: no branches of unions, no index where one item stands alone."""
    keys = []
    for part in loc:
        if isinstance(part, int):
            if not isinstance(tree, list | tuple):
                continue
            tree = tree[part]
        elif part in ("str", "FamilyPick", "int", "float", "bool") or "[" in part:
            continue
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
        keys.append(str(part))
    return keys


def _keys_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    here: Any = model
    for part in loc:
        if isinstance(part, int) or not (isinstance(here, type) and issubclass(here, BaseModel)):
            continue
        fields = {f.alias or n: f for n, f in here.model_fields.items()}
        if part not in fields:
            continue
        here = _section_in(fields[part].annotation) or here
    return sorted(f.alias or n for n, f in here.model_fields.items())


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None


def _override(tree: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override reads key=value, such as distill.tokens=3M")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"{override!r}: the value is not valid YAML") from None
    *path, last = key.split(".")
    here = tree
    for part in path:
        here = here[_index(here, part, override)] if isinstance(here, list) else here.setdefault(part, {})
        if not isinstance(here, dict | list):
            raise RecipeError(f"{override!r}: {part} holds a single value, so nothing can be set inside it")
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    else:
        here[last] = value


def _index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise RecipeError(f"{override!r}: {part} must be an index from 0 to {len(items) - 1}")


def _expand(tree: Any, where: str, key: str) -> Any:
    if isinstance(tree, dict):
        return {k: _expand(v, where, f"{key}.{k}".lstrip(".")) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_expand(v, where, f"{key}.{i}") for i, v in enumerate(tree)]
    if isinstance(tree, str):
        for name in re.findall(r"\$\{(\w+)\}", tree):
            if name not in os.environ:
                raise RecipeError(f"{where}: {key} names ${{{name}}}, but that environment variable is not set")
        return re.sub(r"\$\{(\w+)\}", lambda name: os.environ[name[1]], tree)
    return tree
