"""A study's records, analysed: laws by budget and over budgets, tests of the hypotheses, the roles, the picks."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from capgap.errors import LawError
from capgap.law import (
    BudgetOptimum,
    LawFit,
    LawScore,
    Observation,
    RoleLaw,
    RoleObservation,
    RoleSurface,
    Test,
    TokenLaw,
    compare_laws,
    constant_ratio,
    find_roles,
    fit_law,
    fit_roles,
    fit_tokens,
    interior_optimum,
    teacher_matters,
)
from capgap.records import RunRecord
from capgap.report.rows import (
    budget_names,
    by_budget,
    fittable,
    is_coupled,
    observations_of,
    student_scales,
    student_tokens,
)

PAPER = "the paper's way"


@dataclass(frozen=True)
class BudgetLaw:
    """The law of one budget.

    Attributes:
        name: such as "30 tokens per parameter".
        per_parameter: tokens for each parameter of the student, a geometric mean over its runs.
        records: the coupled runs that it rests on; observations: of the students with enough teachers.
        law: None where no student has enough teachers.
    """

    name: str
    per_parameter: float
    records: tuple[RunRecord, ...]
    observations: tuple[Observation, ...]
    law: LawFit | None

    @property
    def interior(self) -> int:
        """How many optima lie inside their grids."""
        return len(self.law.interior) if self.law else 0


@dataclass(frozen=True)
class BudgetRoles:
    """The roles apart at one budget: the surface of each student for which they were varied, and the law."""

    name: str
    surfaces: tuple[RoleSurface, ...]
    law: RoleLaw


@dataclass(frozen=True)
class ConditionLaw:
    """The law under a condition at one budget, and that of the paper's way of the same students.

    Attributes:
        paper: of all its students where the condition has students of its own; None where there is none at this budget.
        same: whether both are of the same students.
    """

    condition: str
    budget: str
    law: LawFit
    paper: LawFit | None
    same: bool


@dataclass(frozen=True)
class Analysis:
    """All that a study's records say of the law.

    Attributes:
        budgets: the laws, from few tokens to many.
        tokens: the law with tokens beside the student's scale; scores: each law's error on scales left out. None and
            empty where there are too few optima.
        conditions: the laws under them, each beside the paper's way.
        tests: of the hypotheses, with the budget or the condition each is of.
        roles: from few tokens to many.
        notes: why something is not there.
    """

    budgets: tuple[BudgetLaw, ...]
    tokens: TokenLaw | None
    scores: tuple[LawScore, ...]
    conditions: tuple[ConditionLaw, ...]
    tests: tuple[tuple[str, Test], ...]
    roles: tuple[BudgetRoles, ...]
    notes: tuple[str, ...]

    @property
    def main(self) -> BudgetLaw | None:
        """The budget to show first: with most optima inside their grids, and of these with most runs."""
        laws = [budget for budget in self.budgets if budget.law is not None]
        return max(laws, key=lambda b: (b.interior, len(b.records)), default=None)

    def nearest(self, per_parameter: float) -> BudgetLaw | None:
        """The law of the budget whose tokens per parameter are nearest, by factor."""
        laws = [budget for budget in self.budgets if budget.law is not None]
        return min(laws, key=lambda b: abs(math.log(b.per_parameter / per_parameter)), default=None)


def analyse(records: Sequence[RunRecord]) -> Analysis:
    """Analyses a study's records; whatever they are too few for is left out, and said in the notes."""
    notes: list[str] = []
    budgets = tuple(_law_of_budget(name, rows, notes) for name, rows in by_budget(records).items())
    optima = optima_of(budgets)
    several = len(budgets) > 1
    tokens = _or_note(lambda: fit_tokens(optima), "No law with tokens", notes) if several else None
    scores = _or_note(lambda: compare_laws(optima), "Laws were not compared", notes) if optima else None
    conditions = tuple(_conditions(records, notes))
    return Analysis(
        budgets,
        tokens,
        tuple(scores or ()),
        conditions,
        tuple(_tests(budgets, optima, conditions, notes)),
        tuple(_roles(records, notes)),
        tuple(notes),
    )


def optima_of(budgets: Sequence[BudgetLaw]) -> list[BudgetOptimum]:
    """All optima of all budgets, each with its student's own tokens per parameter; its group is its budget's name."""
    found = []
    for budget in budgets:
        tokens = student_tokens(budget.records)
        for row in budget.law.optima if budget.law else ():
            found.append(BudgetOptimum(row, tokens[row.student] / row.student, budget.name))
    return _with_errors(found)


def _with_errors(optima: Iterable[BudgetOptimum]) -> list[BudgetOptimum]:
    """Those of a budget or group without any optimum inside its grid have no error: they get the others' median."""
    optima = list(optima)
    known = [o.optimum for o in optima if o.optimum.error is not None]
    if not known:
        return optima
    error = statistics.median(row.error or 0.0 for row in known)
    degrees = min((row.degrees for row in known if row.degrees), default=None)
    missing = {"error": error, "degrees": degrees}
    return [o if o.optimum.error is not None else replace(o, optimum=replace(o.optimum, **missing)) for o in optima]


T = TypeVar("T")


def _or_note(make: Callable[[], T], what: str, notes: list[str]) -> T | None:
    try:
        return make()
    except LawError as error:
        notes.append(f"{what}: {error}.")
        return None


def _law_of_budget(name: str, records: Sequence[RunRecord], notes: list[str]) -> BudgetLaw:
    enough, _ = fittable(observations_of(records))
    ratio = statistics.geometric_mean(r.tokens / r.student_scale for r in records)
    law = _or_note(lambda: fit_law(enough), f"No law was fitted at {name}", notes) if enough else None
    return BudgetLaw(name, ratio, tuple(records), tuple(enough), law)


def _tests(
    budgets: Sequence[BudgetLaw],
    optima: Sequence[BudgetOptimum],  # of the budgets, each with the name of its own as its group
    conditions: Sequence[ConditionLaw],
    notes: list[str],
) -> list[tuple[str, Test]]:
    found: list[tuple[str, Test | None]] = []
    for budget in budgets:
        for test in (teacher_matters, interior_optimum):
            if budget.law is not None:
                made = _or_note(lambda test=test, b=budget: test(b.observations), f"At {budget.name} no test", notes)
                found.append((budget.name, made))
        if budget.interior:
            mine = [o for o in optima if o.group == budget.name]
            found.append((budget.name, _or_note(lambda m=mine: constant_ratio(m), f"H3 at {budget.name}", notes)))
    if len(budgets) > 1 and any(budget.interior for budget in budgets):
        found.append(("all budgets", _or_note(lambda: constant_ratio(optima, "groups"), "H3 across budgets", notes)))
    for condition in dict.fromkeys(law.condition for law in conditions):
        pair = _with_errors(
            BudgetOptimum(row, 1.0, group)
            for beside in conditions
            if beside.condition == condition
            for group, law in ((PAPER, beside.paper), (condition, beside.law))
            for row in (law.optima if law else ())
        )
        made = _or_note(lambda p=pair: constant_ratio(p, "groups"), f"H3, {condition}", notes)
        found.append((condition, made))
    return [(name, test) for name, test in found if test is not None]


def _conditions(records: Sequence[RunRecord], notes: list[str]) -> list[ConditionLaw]:
    """The laws of each condition and budget, beside the paper's way's of the same students and budget (of all of its
    students, where the condition has students of its own)."""
    coupled = [r for r in records if is_coupled(r)]
    name = budget_names(coupled)
    plain = [r for r in coupled if not r.condition]
    cells: dict[tuple[str, str], list[RunRecord]] = {}
    for r in sorted((r for r in coupled if r.condition), key=lambda r: r.tokens / r.student_scale):
        cells.setdefault((r.condition, name[r.run]), []).append(r)
    found = []
    for condition in dict.fromkeys(r.condition for r in coupled if r.condition):
        known = {r.student for r in coupled if r.condition == condition} & {r.student for r in plain}
        for (other, budget), rows in cells.items():
            if other != condition:
                continue
            students = {r.student for r in rows}
            beside = [r for r in plain if name[r.run] == budget and (not known or r.student in students)]
            law = _or_note(lambda r=rows: _quick_law(r), f"No law under {condition} at {budget}", notes)
            paper = _or_note(lambda r=beside: _quick_law(r), f"No law beside {condition} at {budget}", notes)
            if law is not None:
                found.append(ConditionLaw(condition, budget, law, paper, bool(known)))
    return found


def _quick_law(records: Sequence[RunRecord]) -> LawFit | None:
    """Without intervals, and whatever the condition; None where no student has enough teachers."""
    enough, _ = fittable(observations_of([r.model_copy(update={"condition": ""}) for r in records]))
    return fit_law(enough, replicates=0) if enough else None


def role_runs(records: Sequence[RunRecord], budget: str | None = None) -> list[RunRecord]:
    """The distilled runs of a start that was cut, of one budget or of all, without those under a condition."""
    mine = [r for r in records if r.kind == "distill" and r.start and not r.condition]
    names = budget_names(mine)
    return [r for r in mine if budget is None or names[r.run] == budget]


def _roles(records: Sequence[RunRecord], notes: list[str]) -> list[BudgetRoles]:
    """Surfaces of the students whose start and teacher were varied apart, by budget."""
    mine = role_runs(records)
    names = budget_names(mine)
    found = []
    for budget in dict.fromkeys(names[r.run] for r in sorted(mine, key=lambda r: r.tokens / r.student_scale)):
        surfaces = []
        there = [r for r in mine if names[r.run] == budget]
        scales = student_scales(there)
        for student in sorted({scale for scale, _ in scales.values()}):
            rows = [r for r in there if scales[r.run][0] == student]
            if len({(r.start, r.teacher) for r in rows if r.start != r.teacher}) < 3:
                continue
            runs = [
                RoleObservation(float(r.start_scale or 0), float(r.teacher_scale or 0), r.loss, r.seed) for r in rows
            ]
            surface = _or_note(lambda s=student, o=runs: find_roles(s, o), f"Roles at {budget}", notes)
            surfaces += [surface] if surface else []
        if surfaces:
            found.append(BudgetRoles(budget, tuple(surfaces), fit_roles(surfaces, budget=budget)))
    return found
