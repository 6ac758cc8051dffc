"""What laws would have picked for the largest student, had they been fitted without it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capgap.errors import LawError
from capgap.law import SecondLaw, TokenLaw, fit_law, fit_roles, fit_tokens, scale_text
from capgap.records import RunRecord
from capgap.report.analysis import Analysis, optima_of, role_runs
from capgap.report.rows import fittable, observations_of, student_scales
from capgap.report.second import second_law_of

Pair = tuple[str | None, str]


@dataclass(frozen=True)
class Pick:
    """What a rule picks for one student at one budget.

    Attributes:
        student, budget: names.
        apart: whether start and teacher were picked apart.
        rule: such as "law" or "2.5 S".
        start, teacher: names of models in the grid.
        loss: of the student, the mean over seeds, nats per token; best: the lowest of the grid.
        note: how the rule came to it.
    """

    student: str
    budget: str
    apart: bool
    rule: str
    start: str | None
    teacher: str
    loss: float
    best: float
    note: str = ""

    @property
    def excess(self) -> float:
        """By what share the loss is above the best in the grid."""
        return self.loss / self.best - 1


def picks_of(records: Sequence[RunRecord], analysis: Analysis) -> list[Pick]:
    """For the largest student of each budget, the picks of a law fitted without it and of simpler rules.

    The law is that of the budget, without the student. The other rules are 2.5 S, the largest teacher, the nearest
    above the student, and where the records allow a refit the second law, with the teachers' own
    losses. With the roles apart, the law is the ratios of the other students' optima of start and teacher; the other
    rules pick one model for both.
    """
    own = {r.student: r.loss for r in records if r.kind == "pretrain"}
    second = _second(records)
    found = []
    for budget in analysis.budgets:
        scales = student_scales(budget.records)
        if len({scale for scale, _ in scales.values()}) < 2:
            continue
        largest = max(scale for scale, _ in scales.values())
        mine = [r for r in budget.records if scales[r.run][0] == largest]
        rest = [r for r in budget.records if scales[r.run][0] != largest]
        losses = _mean_losses(mine)
        asked = _simple(mine, own, second) | _law_without(rest, largest)
        tokens = _tokens_without(analysis, largest)
        if tokens is not None:
            at = tokens.predict(largest, statistics.mean(r.tokens for r in mine))
            asked["law with tokens"] = (at.teacher, f"{at.ratio:.2f} S")
        models = {r.teacher: float(r.teacher_scale or 0) for r in mine if r.teacher}
        for rule, (wanted, note) in asked.items():
            teacher = _nearest(models, wanted)
            found.append(_pick(mine[0], budget.name, False, rule, (teacher, teacher), losses, note))
    return found + _apart(records, analysis, own, second)


def _apart(
    records: Sequence[RunRecord], analysis: Analysis, own: Mapping[str, float], second: SecondLaw | None
) -> list[Pick]:
    found = []
    for roles in analysis.roles:
        if len(roles.surfaces) < 2:
            continue
        largest = roles.surfaces[-1].student
        there = role_runs(records, roles.name)
        scales = student_scales(there)
        mine = [r for r in there if scales[r.run][0] == largest]
        losses, law = _mean_losses(mine), fit_roles(roles.surfaces[:-1])
        starts = {r.start: float(r.start_scale or 0) for r in mine if r.start}
        teachers = {r.teacher: float(r.teacher_scale or 0) for r in mine if r.teacher}
        start, teacher, _ = law.predict(largest)
        # Of the pairs that were run, the nearest: a grid may not be full yet.
        pair = min(
            losses,
            key=lambda pair: math.hypot(math.log(starts[pair[0] or ""] / start), math.log(teachers[pair[1]] / teacher)),
        )
        note = f"start {law.start.value:.2f} S, teacher {law.teacher.value:.2f} S"
        found.append(_pick(mine[0], roles.name, True, "law of roles", pair, losses, note))
        coupled = {name: scale for name, scale in teachers.items() if (name, name) in losses}
        for rule, (wanted, words) in _simple(mine, own, second).items() if coupled else ():
            model = _nearest(coupled, wanted)
            found.append(_pick(mine[0], roles.name, True, rule, (model, model), losses, words))
    return found


def _simple(
    mine: Sequence[RunRecord], own: Mapping[str, float], second: SecondLaw | None
) -> dict[str, tuple[float, str]]:
    """Rules that need no fit to other students: the teacher asked for, parameters, and how."""
    student = float(mine[0].student_scale)
    scales = {r.teacher: float(r.teacher_scale or 0) for r in mine if r.teacher}
    asked = {
        "2.5 S": (2.5 * student, ""),
        "the largest": (max(scales.values()), ""),
        "the nearest above": (min(scales.values()), ""),
    }
    known = [name for name in scales if name in own]
    if second is not None and known:
        tokens = statistics.mean(r.tokens for r in mine)
        best = known[second.best_teacher([own[name] for name in known], student, tokens)]
        asked["the second law"] = (scales[best], second.source.split(";")[0])
    return asked


def _law_without(rest: Sequence[RunRecord], student: float) -> dict[str, tuple[float, str]]:
    enough, _ = fittable(observations_of(rest))
    if not enough:
        return {}
    try:
        law = fit_law(enough, replicates=0)
        at = law.predict(student)
    except LawError as error:
        return {"law": (student, f"{error}; the nearest above is taken")}
    return {"law": (at.teacher, f"{at.method}, {at.ratio:.2f} S")}


def _tokens_without(analysis: Analysis, student: float) -> TokenLaw | None:
    rest = [o for o in optima_of(analysis.budgets) if o.optimum.student != student]
    try:
        return fit_tokens(rest, replicates=0) if rest else None
    except LawError:
        return None


def _second(records: Sequence[RunRecord]) -> SecondLaw | None:
    """The second law of the records; None where they allow no refit, as the published one counts other parameters."""
    try:
        fit = second_law_of(records)
    except LawError:
        return None
    return fit.law if fit else None


def _mean_losses(records: Sequence[RunRecord]) -> dict[Pair, float]:
    groups: dict[Pair, list[float]] = {}
    for r in records:
        groups.setdefault((r.start, r.teacher or ""), []).append(r.loss)
    return {pair: statistics.mean(losses) for pair, losses in groups.items()}


def _nearest(models: Mapping[str, float], wanted: float) -> str:
    return min(models, key=lambda name: abs(math.log(models[name] / wanted)))


def _pick(
    one: RunRecord, budget: str, apart: bool, rule: str, pair: Pair, losses: Mapping[Pair, float], note: str
) -> Pick:
    name = f"{one.student} ({scale_text(one.student_scale)})"
    return Pick(name, budget, apart, rule, *pair, losses[pair], min(losses.values()), note)
