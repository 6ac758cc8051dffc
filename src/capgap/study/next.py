"""Which trials to run next: those that narrow the law's interval most for what they cost.

The law is taken as ln T* = k0 + k1 ln S + g ln(D/S). Of each student and budget the error of ln T* follows from its
runs by the delta method, and from all errors the law's variance; what a further run would do to it can be computed
before the run. Trials are taken one after another, each the one with the largest fall of the law's error over the
study's students for each FLOP (greedy V-optimal design, Fedorov 1972).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from capgap.cost import flops_per_token, format_flops
from capgap.errors import LawError, StudyError
from capgap.law import BudgetOptimum, Observation, find_optimum, fit_law, fit_tokens
from capgap.law.optimum import Floats, parabola
from capgap.records import RunRecord
from capgap.study.family import Family
from capgap.study.spec import Budget, Grid
from capgap.study.trials import shared_tokens

GROWTH = 0.5
"""Exponent of tokens per parameter in T*/S where the records do not tell it: an assumption."""
SCATTER = 0.15
"""Standard deviation of ln T* about the law, where the records do not tell it: an assumption."""
STEP = 3.0
"""By which factor a new budget is longer than the longest."""
MOST_SEEDS = 5
"""Seeds of one pair from which on more are not proposed: then the parabola's shape errs more than seeds scatter."""


@dataclass(frozen=True)
class Proposal:
    """Runs of one student, budget and seed, each cut from and taught by one of the teachers.

    Attributes:
        student: its index in the study; teachers: names; per_parameter: tokens for each of the student's parameters.
        tokens: of each run, where the study gives counts of tokens; None where it gives tokens per parameter.
        flops: of these runs, without what longer runs take over from shorter ones.
    """

    student: int
    teachers: tuple[str, ...]
    per_parameter: float
    seed: int
    flops: float
    tokens: int | None = None

    def grid(self) -> str:
        """The line for the study's YAML file."""
        names = ", ".join(self.teachers)
        budget = f"{self.per_parameter:g}x" if self.tokens is None else str(self.tokens)
        return f"  - {{students: [{self.student}], teachers: [{names}], seeds: [{self.seed}], tokens: [{budget}]}}"


@dataclass(frozen=True)
class Advice:
    """What to run, in order.

    Attributes:
        before, after: standard deviation of ln T* by the law, mean over students, at the longest budget: now, and with
            all that is proposed.
        flops: of all of it.
        has_grids: whether the study's file has grids, to which these are added.
    """

    proposals: tuple[Proposal, ...]
    before: float
    after: float
    flops: float
    has_grids: bool = True

    def lines(self) -> list[str]:
        """The advice in words, and as grids for the study's YAML file."""
        if not self.proposals:
            return ["nothing fits in this budget that would narrow the law's interval"]
        factors = [math.exp(2 * spread) for spread in (self.before, self.after)]
        return [
            (
                f"T* is known to a factor of {factors[0]:.2f} either way (95 %), mean over students; with these runs, "
                f"of {format_flops(self.flops)}, it should be {factors[1]:.2f}"
            ),
            "grids:",
            *([] if self.has_grids else ["  - {}"]),  # what a file without grids stands for
            *(proposal.grid() for proposal in self.proposals),
        ]


@dataclass
class _Cell:
    """A student at a budget: the seeds with which each of its teachers was run, and where its optimum is."""

    student: int
    per_parameter: float
    runs: dict[str, set[int]]
    best: float
    inside: bool
    tokens: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(seeds) for name, seeds in self.runs.items()}


def next_trials(family: Family, records: Sequence[RunRecord], flops: float) -> Advice:
    """The trials to run next for so many FLOPs.

    Raises: StudyError if the budget is not positive, or no student has three teachers yet.
    """
    if not flops > 0:
        raise StudyError(f"the budget, {flops:g} FLOPs, must be positive")
    mine = [r for r in records if r.kind == "distill" and r.start == r.teacher and not r.condition]
    design = _Design.of(family, mine)
    left, found = flops, []
    reach = design.farthest
    before = design.spread(reach)
    while True:
        now = design.spread(reach)
        options = [(option, cost) for option in design.options() if (cost := design.cost(option)) <= left]
        gains = [(now - design.spread(reach, option)) / cost for option, cost in options]
        if not gains or max(gains) <= 0:
            break
        option, cost = options[int(np.argmax(gains))]
        design.add(option)
        left -= cost
        tokens = design.tokens(option)
        found.append(Proposal(option.student, option.teachers, option.per_parameter, option.seed, cost, tokens))
    has_grids = family.spec.grids != [Grid()]
    return Advice(tuple(_joined(found)), before, design.spread(reach), flops - left, has_grids)


def flops_of_budget(text: str, records: Sequence[RunRecord]) -> float:
    """FLOPs from 2e15, or from hours of one worker, 6h, at the mean speed of the records.

    Raises: StudyError if it is neither, or no record tells the speed.
    """
    words = text.strip().lower()
    try:
        value = float(words.removesuffix("h"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise StudyError(f"budget = {text!r} must be FLOPs, such as 2e15, or hours of a worker, such as 6h")
    if not words.endswith("h"):
        return value
    seconds = sum(r.seconds for r in records if r.kind == "distill")
    if not seconds:
        raise StudyError(f"budget = {text!r}: no record tells how fast this study runs; give FLOPs")
    return value * 3600 * sum(r.flops_spent for r in records if r.kind == "distill") / seconds


@dataclass(frozen=True)
class _Option:
    student: int
    per_parameter: float
    teachers: tuple[str, ...]
    seed: int


class _Design:
    """The runs there are, and what the law's variance would be with others."""

    def __init__(self, family: Family, cells: Sequence[_Cell], noise: float, bend: float, law: Floats, scatter: float):
        self._family, self._noise, self._bend, self._law, self._scatter = family, noise, bend, law, scatter
        self._cells = {(cell.student, cell.per_parameter): cell for cell in cells}
        self._logs = {name: math.log(model.scale) for name, model in family.models.items()}
        self._places = sorted({cell.student for cell in cells})
        self._budgets = sorted({cell.per_parameter for cell in cells})

    @property
    def farthest(self) -> float:
        """The longest budget, tokens per parameter, for which the law is to be known."""
        return self._budgets[-1]

    @classmethod
    def of(cls, family: Family, records: Sequence[RunRecord]) -> "_Design":
        """From a study's coupled records."""
        names = {name: index for index, name in enumerate(family.student_names)}
        groups: dict[tuple[int, float], list[RunRecord]] = {}
        for r in records:
            if r.student in names and r.teacher in family.models:
                groups.setdefault((names[r.student], float(f"{r.tokens / r.student_scale:.2g}")), []).append(r)
        cells, variances, bends, optima = [], [], [], []
        for (student, ratio), rows in groups.items():
            losses, teachers = [r.loss for r in rows], [float(r.teacher_scale or 0) for r in rows]
            if len(set(teachers)) < 3:
                continue
            optimum = find_optimum(teachers, losses)
            runs: dict[str, set[int]] = {}
            for r in rows:
                runs.setdefault(r.teacher or "", set()).add(r.seed)
            inside = optimum.censored is None
            told = rows[0].tokens if _in_tokens(family, rows[0].tokens) else None
            cells.append(_Cell(student, ratio, runs, optimum.teacher, inside, told))
            if len(rows) > 3:
                variances.append((float(np.sum(np.square(optimum.residuals))), len(rows) - 3))
            if inside:
                bends.append(optimum.curvature / 2)
            seen = {(r.student_scale, r.teacher_scale, r.seed): r for r in rows}.values()
            law = fit_law(
                [Observation(float(r.student_scale), float(r.teacher_scale or 0), r.loss, r.seed) for r in seen],
                replicates=0,
            )
            optima += [BudgetOptimum(row, ratio) for row in law.optima if row.error is not None]
        if not cells:
            raise StudyError(
                "no student has been distilled from three teachers that it was cut from yet; run those first"
            )
        total, degrees = map(sum, zip(*variances, strict=True)) if variances else (0.0, 0)
        noise = total / degrees if degrees else 1e-4
        try:
            fitted = fit_tokens(optima, replicates=0)
            law = np.array([math.log(fitted.ratio.value), fitted.exponent.value, fitted.tokens.value])
            law[0] += (1 - law[1]) * math.log(fitted.student) - law[2] * math.log(fitted.per_parameter)
        except LawError:
            law = _assumed(cells, family.scales)
        bend = float(np.median(bends)) if bends else 0.02
        return cls(family, cells, max(noise, 1e-8), bend, law, SCATTER)

    def spread(self, per_parameter: float, with_: _Option | None = None) -> float:
        """Mean over students of the standard deviation of ln T* by the law at a budget."""
        information = np.diag([1e-2, 1e-1, 1e-1])
        for key, cell in self._cells.items():
            counts = dict(cell.counts)
            added = with_ is not None and key == (with_.student, with_.per_parameter)
            for name in with_.teachers if with_ is not None and added else ():
                counts[name] = counts.get(name, 0) + 1
            information += self._weight(cell.student, cell.per_parameter, counts, cell.best, cell.inside)
        if with_ is not None and (with_.student, with_.per_parameter) not in self._cells:
            counts = dict.fromkeys(with_.teachers, 1)
            best = self._foretold(with_.student, with_.per_parameter)
            inside = self._probably_inside(with_, best)
            information += inside * self._weight(with_.student, with_.per_parameter, counts, best, True)
        covariance = np.linalg.inv(information)
        rows = [self._row(student, per_parameter) for student in self._places]
        return float(np.mean([math.sqrt(row @ covariance @ row) for row in rows]))

    def options(self) -> list[_Option]:
        """A further seed of one teacher where the optimum is inside; where it is not, all near teachers for longer."""
        found = []
        for cell in self._cells.values():
            if cell.inside:
                for name in (n for n, count in cell.counts.items() if count < MOST_SEEDS):
                    seed = next(s for s in itertools.count() if s not in cell.runs[name])
                    found.append(_Option(cell.student, cell.per_parameter, (name,), seed))
        for student in self._places:
            longest = max(ratio for index, ratio in self._cells if index == student)
            longer = next((b for b in self._budgets if b > longest), float(f"{longest * STEP:.2g}"))
            if not self._cells[student, longest].inside:
                best = self._foretold(student, longer)
                near = sorted(
                    (m.name for m in self._family.larger(student)), key=lambda n: abs(self._logs[n] - math.log(best))
                )[:5]
                if len(near) >= 3:
                    ordered = tuple(sorted(near, key=lambda n: self._logs[n]))
                    found.append(_Option(student, longer, ordered, 0))
        return found

    def cost(self, option: _Option) -> float:
        """FLOPs of the option's runs, without what each takes over from a shorter run of its teacher and seed."""
        family, block = self._family, self._family.spec.data.block
        tokens, total = self._whole(option.student, option.per_parameter), 0.0
        for name in option.teachers:
            shorter = [
                ratio
                for (index, ratio), cell in self._cells.items()
                if index == option.student and ratio < option.per_parameter and option.seed in cell.runs.get(name, ())
            ]
            spared = self._spared(option.student, max(shorter), tokens) if shorter else 0
            student, teacher = family.config(option.student, family.models[name]), family.models[name].config
            per_token = flops_per_token(student, block).training + flops_per_token(teacher, block).forward
            total += (tokens - spared) * per_token
        return total

    def add(self, option: _Option) -> None:
        """Takes the option's runs as done."""
        key = option.student, option.per_parameter
        if key not in self._cells:
            best = self._foretold(option.student, option.per_parameter)
            self._cells[key] = _Cell(option.student, option.per_parameter, {}, best, True)
        for name in option.teachers:
            self._cells[key].runs.setdefault(name, set()).add(option.seed)

    def tokens(self, option: _Option) -> int | None:
        """The tokens of the option's runs, if the study counts them so; None if they are by the parameter."""
        cell = self._cells.get((option.student, option.per_parameter))
        if cell is not None and (cell.tokens is not None or any(_per_parameter(self._family))):
            return cell.tokens
        return None if any(_per_parameter(self._family)) else self._whole(option.student, option.per_parameter)

    def _whole(self, student: int, ratio: float) -> int:
        """A student's tokens at a budget, in whole steps."""
        cell = self._cells.get((student, ratio))
        if cell is not None and cell.tokens is not None:
            return cell.tokens
        budget = Budget(per_parameter=ratio)
        return budget.of(self._family.scales[student], self._family.spec.distill.tokens_per_step)

    def _spared(self, student: int, shorter: float, tokens: int) -> int:
        """What a run of so many tokens takes over from one at a shorter budget."""
        settings = self._family.spec.distill
        short = settings.model_copy(update={"tokens": self._whole(student, shorter)})
        long = settings.model_copy(update={"tokens": tokens})
        return shared_tokens(short, long, self._family.spec.data.block)

    def _weight(self, student: int, ratio: float, counts: Mapping[str, int], best: float, inside: bool) -> Floats:
        """What a student's runs at a budget tell of the law, [3, 3]."""
        row = self._row(student, ratio)
        if not inside:
            # A bound tells about as much as an optimum whose error is a factor of e.
            return np.outer(row, row) / (1.0 + self._scatter**2)
        names = list(counts)
        middle = math.log(best)
        design = parabola(np.array([self._logs[name] - middle for name in names]))
        weighted = (design.T * np.array([counts[name] for name in names])) @ design
        gradient = np.array([0.0, 1.0, 0.0]) / (2 * self._bend)
        variance = float(gradient @ np.linalg.pinv(weighted) @ gradient) * self._noise
        return np.outer(row, row) / (variance + self._scatter**2)

    def _row(self, student: int, ratio: float) -> Floats:
        return np.array(
            [1.0, math.log(self._family.scales[student] / self._family.scales[self._places[0]]), math.log(ratio)]
        )

    def _foretold(self, student: int, ratio: float) -> float:
        constant, exponent, tokens = self._law
        scale = self._family.scales[student]
        return max(scale, math.exp(constant + exponent * math.log(scale) + tokens * math.log(ratio)))

    def _probably_inside(self, option: _Option, best: float) -> float:
        """The chance that an optimum foretold with an error of a factor of e^(1/2) lies within the teachers."""
        logs = [self._logs[name] for name in option.teachers]
        low, high = ((edge - math.log(best)) / 0.5 for edge in (min(logs), max(logs)))
        return 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))


def _per_parameter(family: Family) -> Iterator[bool]:
    """Of each budget of the study whether it is by the parameter."""
    spec = family.spec
    return (budget.per_parameter is not None for grid in spec.grids for budget in spec.budgets(grid))


def _in_tokens(family: Family, tokens: int) -> bool:
    """Whether a run's tokens are one of the counts that the study gives."""
    spec, step = family.spec, family.spec.distill.tokens_per_step
    counts = {b.of(1, step) for grid in spec.grids for b in spec.budgets(grid) if b.tokens is not None}
    return tokens in counts


def _assumed(cells: Sequence[_Cell], scales: Sequence[int]) -> Floats:
    """T* = c S (D/S)^GROWTH through the optima that there are, censored ones at their edges."""
    logs = [math.log(c.best / scales[c.student]) - GROWTH * math.log(c.per_parameter) for c in cells]
    return np.array([float(np.mean(logs)), 1.0, GROWTH])


def _joined(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Proposals of one student, budget and seed as one, where the first of them stood."""
    found: dict[tuple[int, float, int], Proposal] = {}
    for p in proposals:
        key = p.student, p.per_parameter, p.seed
        before = found.get(key)
        teachers = (*before.teachers, *p.teachers) if before else p.teachers
        flops = p.flops + (before.flops if before else 0.0)
        found[key] = Proposal(p.student, tuple(dict.fromkeys(teachers)), p.per_parameter, p.seed, flops, p.tokens)
    return list(found.values())
