"""The trials that a study is made of."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field

from capgap.cost import format_count
from capgap.distill import Schedule
from capgap.errors import StudyError
from capgap.recipe import Prune, Section, Train, check
from capgap.study.family import NEAREST, Family, Model
from capgap.study.spec import ALL, NONE, RANDOM, TEACHER, Grid, Race


class Raced(Race):
    """The race that a trial is in: `coupled` among teachers that are each their own start, else of its one start."""

    coupled: bool


class Trial(Section):
    """One training run of a study.

    Attributes:
        name: unique in the study.
        kind: pretrain a member, distill a student, or train it without a teacher.
        member: of a pretrain trial; student: index, of the others.
        start, teacher: names of models; None for random weights, and for cross-entropy alone.
        tokens: that it is trained on.
        needs: names of the trials that must have succeeded before.
        trunk: the trial with fewer tokens and otherwise equal whose constant part this one goes on from, if there is
            one; it must have ended before.
        taken_over: tokens that it need not be trained on if it goes on from its trunk.
        condition, distill, prune: as in the grid it is of.
        race: in which it may be stopped early; None if it is to be run in any case.
    """

    name: str
    kind: Literal["pretrain", "distill", "scratch"]
    member: str | None = None
    student: int | None = None
    start: str | None = None
    teacher: str | None = None
    seed: int
    tokens: int
    needs: list[str] = Field(default=[])
    trunk: str | None = None
    taken_over: int = 0
    condition: str = ""
    distill: dict[str, Any] = Field(default={})
    prune: dict[str, Any] = Field(default={})
    race: Raced | None = None

    def alike(self, other: "Trial") -> bool:
        """Whether both come to one result; from where a run goes on, after which others and if does not change it."""
        hints = {"trunk": None, "taken_over": 0, "needs": [], "race": None}
        return self.model_copy(update=hints) == other.model_copy(update=hints)


def trials_of(family: Family) -> list[Trial]:
    """All trials, each after what it needs: the members by falling cost, then the grids in their order.

    Of a grid come the seeds one after the other, of a seed the budgets from small to large, and of a budget the
    teachers from large to small.

    Raises: StudyError where a grid names a model that is not there; ShapeError where a student cannot be cut.
    """
    spec = family.spec
    trials = []
    if spec.nano is not None:
        pretrain = spec.nano.pretrain
        Schedule.of(pretrain, spec.data.block)  # which finds what does not go with the data
        trials = [
            Trial(name=m.name, kind="pretrain", member=m.name, seed=pretrain.seed, tokens=pretrain.tokens)
            for m in reversed(list(family.models.values()))
        ]
    for index, grid in enumerate(spec.grids):
        trials += _of_grid(family, grid, f"grids.{index}")
    found: dict[str, Trial] = {}
    for trial in trials:
        other = found.setdefault(trial.name, trial)
        if not other.alike(trial):
            raise StudyError(
                f"two different trials are called {trial.name}; give a grid that changes distill or prune a condition "
                "of its own, and budgets that differ by a hundredth at least"
            )
        if other.race != trial.race:  # what one of its grids has run, or races otherwise, is run
            found[trial.name] = other.model_copy(update={"race": None})
    _check_races(found.values())
    return _with_trunks(family, list(found.values()))


def _check_races(trials: Iterable[Trial]) -> None:
    """Raises StudyError where teachers of one student are in two races that differ in share or tolerance."""
    races: dict[str, Raced] = {}
    for trial in trials:
        if trial.race is not None:
            start = "each its own start" if trial.race.coupled else f"start {trial.start}"
            of = f"student {trial.student}, {start}" + (f", {trial.condition}" if trial.condition else "")
            if races.setdefault(of, trial.race) != trial.race:
                raise StudyError(
                    f"two grids race the teachers of {of}, with different share or tolerance; give both the same"
                )


def _with_trunks(family: Family, trials: Sequence[Trial]) -> list[Trial]:
    """Each trial with the one of the next fewer tokens, of any grid, whose constant part it goes on from."""
    cells: dict[str, list[Trial]] = {}
    for trial in trials:
        hints: dict[str, Any] = {"name": "", "tokens": 1, "race": None}
        cells.setdefault(trial.model_copy(update=hints).model_dump_json(), []).append(trial)
    trunks: dict[str, dict[str, Any]] = {}
    for cell in cells.values():
        ordered = sorted(cell, key=lambda trial: trial.tokens)
        for short, long in itertools.pairwise(ordered if ordered[0].kind != "pretrain" else ()):
            shared = shared_tokens(training_of(family, short), training_of(family, long), family.spec.data.block)
            if shared:
                trunks[long.name] = {"trunk": short.name, "taken_over": shared}
    return [trial.model_copy(update=trunks.get(trial.name, {})) for trial in trials]


def shared_tokens(short: Train, long: Train, block: int) -> int:
    """The tokens of the constant part of a run that a longer one goes on from; 0 where it cannot."""
    before, after = Schedule.of(short, block), Schedule.of(long, block)
    return (before.branches_at or 0) * before.step_tokens if before.trunk == after.trunk else 0


def training_of(family: Family, trial: Trial) -> Train:
    """The settings of the loop: the study's, with what the grid changes."""
    return _changed(family.spec.distill, trial.distill, "distill").model_copy(
        update={"seed": trial.seed, "tokens": trial.tokens}
    )


def pruning_of(family: Family, trial: Trial) -> Prune:
    """How the student is cut: the study's way, with what the grid changes."""
    return _changed(family.spec.prune, trial.prune, "prune")


S = TypeVar("S", bound=Section)


def _changed(section: S, changes: dict[str, Any], where: str) -> S:
    return check({**section.model_dump(), **changes}, type(section), where) if changes else section


def _of_grid(family: Family, grid: Grid, where: str) -> list[Trial]:
    trials = []
    for key in ("tokens", "seed"):
        if key in grid.distill:
            raise StudyError(f"{where}.distill.{key}: give {where}.{'seeds' if key == 'seed' else key} instead")
    # Here, where it is known which grid is wrong.
    _changed(family.spec.distill, grid.distill, f"{where}.distill")
    _changed(family.spec.prune, grid.prune, f"{where}.prune")
    cells = _cells(family, grid, where)
    for seed in grid.seeds or family.spec.seeds:
        rounds: dict[int, list[Trial]] = {}
        for cell in cells:
            for place, trial in enumerate(_budgets(family, grid, cell, seed)):
                rounds.setdefault(place, []).append(trial)
        for place in sorted(rounds):
            trials += rounds[place]
    return trials


class _Cell(NamedTuple):
    """Of a grid; `coupled` where it was asked for as the teacher being the start."""

    student: int
    start: Model | None
    teacher: Model | None
    coupled: bool


def _cells(family: Family, grid: Grid, where: str) -> list[_Cell]:
    """The large teachers first."""
    cells = []
    for student in range(len(family.spec.students)) if grid.students is None else grid.students:
        cuttable = family.larger(student)
        teaching = [m for m in family.models.values() if m.scale > NEAREST * family.scales[student]]
        for teacher in _named(family, grid.teachers, teaching, f"{where}.teachers", (NONE,)):
            for start in _named(family, grid.starts, cuttable, f"{where}.starts", (RANDOM, TEACHER)):
                coupled = start == TEACHER
                if coupled:
                    start = teacher
                    if teacher not in cuttable:
                        continue
                assert not isinstance(start, str)
                assert not isinstance(teacher, str)
                cells.append(_Cell(student, start, teacher, coupled))
    return sorted(cells, key=lambda cell: -(cell.teacher.scale if cell.teacher else 0))


def _named(
    family: Family, names: list[str], larger: list[Model], where: str, words: tuple[str, ...]
) -> list[Model | str | None]:
    """The models that the names stand for; None stands for no model."""
    found: list[Model | str | None] = []
    for name in names:
        if name == ALL:
            found += larger
        elif name in words:
            found.append(TEACHER if name == TEACHER else None)
        else:
            model = family.model(name, where)
            if model not in larger:
                raise StudyError(f"{where} = {name!r}: not larger than every student of this grid; name fewer students")
            found.append(model)
    return list(dict.fromkeys(found))


def _budgets(family: Family, grid: Grid, cell: _Cell, seed: int) -> list[Trial]:
    """The trials of one cell and seed, from the fewest tokens on."""
    spec, (student, start, teacher, coupled) = family.spec, cell
    race = Raced(**grid.race.model_dump(), coupled=coupled) if grid.race and teacher else None
    step = spec.distill.tokens_per_step
    tokens = sorted({budget.of(family.scales[student], step) for budget in spec.budgets(grid)})
    stem = (
        f"{family.student_names[student]}-from-{start.name if start else RANDOM}-by-{teacher.name if teacher else NONE}"
    )
    stem += f"-{grid.condition}" if grid.condition else ""
    needs = sorted({m.name for m in (start, teacher) if m and m.member})
    trials: list[Trial] = []
    for count in tokens:
        trial = Trial(
            name=f"{stem}-{format_count(count)}-seed{seed}",
            kind="distill" if teacher else "scratch",
            student=student,
            start=start.name if start else None,
            teacher=teacher.name if teacher else None,
            seed=seed,
            tokens=count,
            needs=needs,
            condition=grid.condition,
            distill=grid.distill,
            prune=grid.prune,
            race=race,
        )
        # What does not go with the data, as a warm-up longer than the run, is found here.
        Schedule.of(training_of(family, trial), spec.data.block)
        trials.append(trial)
    return trials
