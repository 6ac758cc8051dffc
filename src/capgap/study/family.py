"""The study's models: who they are, how large, and the shape in which a student is cut out of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig

from capgap.anatomy import Shape, anatomy_of
from capgap.cost import count_parameters, format_count
from capgap.errors import RecipeError, ShapeError, StudyError
from capgap.models import load_config, resolve_folder
from capgap.pipeline import student_shape
from capgap.plan import load_family, resolve
from capgap.prune.shape import TOLERANCE
from capgap.recipe import FamilyPick
from capgap.study.spec import Member, StudySpec

NEAREST = 1.05
"""A model counts as larger than a student from this ratio on."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model that students are cut from or taught by.

    Attributes:
        scale: parameters; member: of a nano family; ref: folder or hub id of a pretrained one.
    """

    name: str
    scale: int
    config: PretrainedConfig
    member: Member | None = None
    ref: str | None = None

    def folder(self, study: Path) -> Path:
        """Where its weights are."""
        return study / "runs" / self.name / "model" if self.ref is None else resolve_folder(self.ref)


class Family:
    """The models and students of a study.

    Raises: StudyError if two models have one name, or a model is not known; ShapeError if a student is larger than
        every model.
    """

    def __init__(self, spec: StudySpec):
        self.spec = spec
        models = list(self._nano() if spec.nano else self._pretrained())
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise StudyError(f"two of the study's models are called {name}; give each its own size or folder")
        self.models: Mapping[str, Model] = {m.name: m for m in sorted(models, key=lambda m: m.scale)}
        self._shapes: dict[tuple[int, str], Shape | ShapeError] = {}

    def _nano(self) -> list[Model]:
        assert self.spec.nano is not None
        models = []
        for member in self.spec.nano.members:
            config = self.spec.nano.config(member, self.spec.data.block)
            scale = count_parameters(config).total
            models.append(Model(f"t{format_count(scale)}", scale, config, member=member))
        return models

    def _pretrained(self) -> list[Model]:
        models = []
        for teacher in self.spec.teachers:
            refs = [teacher if isinstance(teacher, str) else None]
            if isinstance(teacher, FamilyPick):
                members = load_family(teacher.family).members
                refs = [m.hub for m in members] if teacher.pick == "all" else [resolve(teacher, None)]
            for ref in refs:
                assert ref is not None
                config = load_config(ref)
                models.append(Model(Path(ref).name, count_parameters(config).total, config, ref=ref))
        return models

    @cached_property
    def scales(self) -> list[int]:
        """Of each student, parameters: as asked for, or of its explicit shape."""
        return [self._scale(index) for index in range(len(self.spec.students))]

    def _scale(self, index: int) -> int:
        student = self.spec.students[index]
        if isinstance(student.scale, float):
            return round(student.scale * next(iter(self.models.values())).scale)
        if student.scale is not None:
            return student.scale
        for model in self.models.values():
            try:
                return count_parameters(self.config(index, model)).total
            except ShapeError:
                continue
        raise ShapeError(
            f"students.{index}: no model of the study is large enough to cut it from; it has {self._known()}"
        )

    @cached_property
    def student_names(self) -> list[str]:
        """Of each student, the one given or one that tells the scale."""
        names = [s.name or f"s{format_count(scale)}" for s, scale in zip(self.spec.students, self.scales, strict=True)]
        for index, name in enumerate(names):
            if names.count(name) > 1:
                raise StudyError(f"students.{index}: another student is called {name} too; give each a name")
        return names

    def shape(self, index: int, start: Model) -> Shape:
        """The shape of a student when cut from `start`. Raises ShapeError if it cannot be cut from it.

        A scale is solved for in the smallest model that is large enough; the same shape is cut from all others in
        which it is possible, so that students of one scale do not differ in shape.
        """
        key = index, start.name
        if key not in self._shapes:
            try:
                self._shapes[key] = self._solved(index, start)
            except ShapeError as error:
                self._shapes[key] = error
        found = self._shapes[key]
        if isinstance(found, ShapeError):
            raise found
        return found

    def _solved(self, index: int, start: Model) -> Shape:
        if self.spec.students[index].scale is None:
            return self._alone(index, start)
        for first in self.models.values():
            if first.name == start.name:
                break
            if first.scale > NEAREST * self.scales[index]:
                try:
                    shape = self.shape(index, first)
                except ShapeError:
                    continue
                return shape if self._holds(start, first, shape, self.scales[index]) else self._alone(index, start)
        return self._alone(index, start)

    def _alone(self, index: int, start: Model) -> Shape:
        """The shape that the student has when only this start is looked at."""
        student = self.spec.students[index]
        if student.scale is not None:
            student = student.model_copy(update={"scale": self.scales[index]})
        try:
            return student_shape(student, anatomy_of(start.config))
        except (RecipeError, ShapeError) as error:
            raise ShapeError(f"students.{index}, cut from {start.name}: {error}") from None

    @staticmethod
    def _holds(start: Model, first: Model, shape: Shape, scale: int) -> bool:
        """Whether the shape that was found for `first` can be cut from `start` too, and is of that scale there."""
        mine, other = anatomy_of(start.config), anatomy_of(first.config)
        if start.config.model_type != first.config.model_type or not _within(shape, mine.shape):
            return False
        if (mine.head_dim, mine.group_size) != (other.head_dim, other.group_size):
            return False
        return abs(count_parameters(mine.config_at(shape, range(shape.layers))).total - scale) <= TOLERANCE * scale

    def config(self, index: int, start: Model | None = None) -> PretrainedConfig:
        """The config of a student cut from `start`, or where that is None, from the smallest model that can be cut."""
        start = start or self.larger(index)[0]
        shape = self.shape(index, start)
        return anatomy_of(start.config).config_at(shape, range(shape.layers))

    def larger(self, index: int) -> list[Model]:
        """The models that a student can be cut from, ascending."""
        found = []
        for model in self.models.values():
            if model.scale > NEAREST * self.scales[index]:
                try:
                    self.shape(index, model)
                except ShapeError:
                    continue
                found.append(model)
        if not found:
            raise ShapeError(
                f"students.{index}: no model of the study is large enough to cut {format_count(self.scales[index])} "
                f"parameters from; it has {self._known()}"
            )
        return found

    def model(self, name: str, where: str) -> Model:
        """The model of that name. Raises StudyError, which says `where` it was named, if there is none."""
        if name not in self.models:
            raise StudyError(f"{where} = {name!r}: no member of the family; it has {', '.join(self.models)}")
        return self.models[name]

    def _known(self) -> str:
        return ", ".join(f"{m.name} ({format_count(m.scale)})" for m in self.models.values())


def _within(shape: Shape, full: Shape) -> bool:
    return (
        shape.layers <= full.layers
        and shape.hidden <= full.hidden
        and shape.kv_heads <= full.kv_heads
        and shape.neurons <= full.neurons
        and (shape.experts or 0) <= (full.experts or 0)
    )
