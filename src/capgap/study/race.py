"""The race of a student's teachers: those that can no longer win are stopped early.

A race is run in heats, its budgets of tokens, each with all of its seeds. After each the loss under every teacher at
the largest budget is forecast; a teacher is stopped where even an optimistic forecast is worse than the best one, or
where the race has no FLOPs left for it. All of it is a function of the records, so whoever asks, and when, gets one
answer.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capgap.cost import format_count
from capgap.errors import StudyError
from capgap.records import RunRecord
from capgap.study.forecast import Point, forecast
from capgap.study.spec import Race
from capgap.study.trials import Raced, Trial

OPTIMISM = 2.0
"""Standard errors by which a forecast may be wrong in a teacher's favour."""


@dataclass
class Verdicts:
    """What the races say of their trials: those stopped and why; those that wait for others. All others may run."""

    stopped: dict[str, str] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)


def judge(trials: Sequence[Trial], records: Mapping[str, RunRecord], failed: Collection[str]) -> Verdicts:
    """The verdicts of all races of a study.

    Args:
        records: of the finished trials; failed: names of those that failed for good; all others are still to end.
    """
    found = Verdicts()
    for key, race in {_key(trial, trial.race): trial.race for trial in trials if trial.race}.items():
        members = [trial for trial in trials if trial.kind == "distill" and _key(trial, race) == key]
        _Heats(race, members, records, failed).judge(found)
    return found


def may_be_stopped(trials: Sequence[Trial]) -> set[str]:
    """Names of the trials that a race may stop: those that are not of its first heat."""
    first: dict[object, int] = {}
    raced = [(trial, _key(trial, trial.race)) for trial in trials if trial.race]
    for trial, key in raced:
        first[key] = min(trial.tokens, first.get(key, trial.tokens))
    return {trial.name for trial, key in raced if trial.tokens > first[key]}


def _key(trial: Trial, race: Raced) -> object:
    """What the trials of one race have in common; trials that are not stopped may run in it too."""
    start = ("teacher" if trial.start == trial.teacher else None) if race.coupled else ("start", trial.start)
    same = trial.student, trial.condition, repr(trial.distill), repr(trial.prune)
    return *same, start, race.model_dump_json()


class _Heats:
    """One race: its trials up to the largest budget in which it may stop some."""

    def __init__(
        self, race: Raced, members: Sequence[Trial], records: Mapping[str, RunRecord], failed: Collection[str]
    ):
        self.race, self.records, self.failed = race, records, failed
        self.target = max(trial.tokens for trial in members if trial.race)
        self.trials = [trial for trial in members if trial.tokens <= self.target]
        self.budgets = sorted({trial.tokens for trial in self.trials})
        self.names = {trial.name for trial in self.trials}
        done = [(t.teacher, records[t.name]) for t in self.trials if t.name in records]
        self.per_token = {teacher: record.flops / record.tokens for teacher, record in done}
        self.scales = {teacher: _scale(record) for teacher, record in done}

    def judge(self, found: Verdicts) -> None:
        out: dict[str | None, str] = {}
        decided = True
        for heat, tokens in enumerate(self.budgets):
            if heat and decided:
                out = self._after(self.budgets[heat - 1], tokens, out)
            for trial in self._of(tokens):
                if trial.name in self.records:
                    continue
                if trial.race and trial.teacher in out:
                    found.stopped[trial.name] = out[trial.teacher]
                elif trial.race and not decided:
                    found.held.add(trial.name)
            ended = {*self.records, *self.failed, *found.stopped}
            decided = decided and all(trial.name in ended for trial in self._of(tokens))

    def _of(self, tokens: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.tokens == tokens]

    def _after(self, tokens: int, further: int, out: Mapping[str | None, str]) -> dict[str | None, str]:
        """Who is out after the heat of `tokens`, and why; `out` are those that were before."""
        heat, missed = self._of(tokens), {t.teacher for t in self._of(tokens) if t.name not in self.records}
        ran = {t.teacher for t in heat} - missed
        now = {teacher: why for teacher, why in out.items() if teacher not in ran}
        for trial in heat:
            if trial.name in self.failed and trial.teacher not in now:
                now[trial.teacher] = f"its run of {format_count(tokens)} tokens failed"
        return {**now, **self._stopped(tokens, further, ran)}

    def _stopped(self, tokens: int, further: int, ran: Collection[str | None]) -> dict[str | None, str]:
        """Those of the teachers that ran the heat of `tokens` that do not run the next, of `further`."""
        order = sorted(self.scales, key=lambda teacher: (self.scales[teacher], teacher or ""))
        scales = tuple(float(self.scales[teacher]) for teacher in order)
        seen = forecast(scales, self._points(order, tokens), self.target) if ran else None
        if seen is None:
            return {}
        best = min(ran, key=lambda teacher: seen.loss_N[order.index(teacher)])
        above_N, error_N = seen.above(order.index(best))
        above = {teacher: float(above_N[order.index(teacher)]) for teacher in ran}
        error = {teacher: float(error_N[order.index(teacher)]) for teacher in ran}
        losses = self._mean_losses(tokens)
        margin = self.race.tolerance * min(losses[teacher] for teacher in ran)
        hopeful = [teacher for teacher in ran if above[teacher] - OPTIMISM * error[teacher] <= margin]

        cost: dict[str | None, float] = {}
        for trial in self._of(further):
            cost[trial.teacher] = cost.get(trial.teacher, 0.0) + (self._flops(trial) if trial.race else 0.0)
        anyway = {trial.teacher for trial in self._of(further)}
        anyway -= {trial.teacher for trial in self._of(further) if trial.race}
        allowance = self._left(tokens) / sum(budget > tokens for budget in self.budgets)
        allowance -= math.fsum(self._flops(trial) for trial in self._of(further) if not trial.race)
        kept = set(anyway)
        for teacher in sorted(hopeful, key=lambda teacher: (above[teacher], self.scales[teacher])):
            if teacher not in kept and cost.get(teacher, 0.0) <= allowance:
                kept.add(teacher)
                allowance -= cost.get(teacher, 0.0)
        if kept == anyway:
            kept.add(best)  # nobody can be paid for: somebody must arrive
        when = f"after {format_count(tokens)} tokens its loss at {format_count(self.target)} is forecast"
        reasons = {}
        for teacher in set(ran) - kept:
            reasons[teacher] = f"{when} {above[teacher]:.4f} ± {error[teacher]:.4f} nats above that of {best}"
            if teacher in hopeful:
                share = f"{100 * self.race.share:g} % of the grid's FLOPs"
                reasons[teacher] += f", and the race, which may take {share}, has none left for it"
                if teacher == best:
                    reasons[teacher] = f"{when} to be the lowest, but it would take the race over {share}"
        return reasons

    def _mean_losses(self, tokens: int) -> dict[str | None, float]:
        """The loss of each teacher that ran a heat with all of its seeds, nats per token, their mean."""
        found: dict[str | None, list[float]] = {}
        heat = self._of(tokens)
        missed = {trial.teacher for trial in heat if trial.name not in self.records}
        for trial in heat:
            if trial.teacher not in missed:
                found.setdefault(trial.teacher, []).append(self.records[trial.name].loss)
        return {teacher: statistics.fmean(losses) for teacher, losses in found.items()}

    def _points(self, order: Sequence[str | None], tokens: int) -> tuple[Point, ...]:
        """All that was measured up to the heat of `tokens`, once each: a run brings those of its trunk."""
        found: dict[Any, Point] = {}
        for trial in sorted(self.trials, key=lambda trial: (trial.tokens, trial.name)):
            record = self.records.get(trial.name)
            if record is None or trial.tokens > tokens:
                continue
            for row in record.curve or [{"tokens": record.tokens, "loss": record.loss}]:
                if "loss" in row and row["tokens"] > 0:
                    part = trial.seed, 0 if _at_full_rate(row, record.recipe) else record.tokens
                    point = Point(order.index(trial.teacher), int(row["tokens"]), part, row["loss"])
                    found.setdefault((point.runner, point.part, point.tokens), point)
        return tuple(found.values())

    def _flops(self, trial: Trial) -> float:
        """Of the trial alone, where it goes on from its trunk; 0 if nothing of its teacher was run."""
        own = trial.tokens - (trial.taken_over if trial.trunk in self.names else 0)
        return own * self.per_token.get(trial.teacher, 0.0)

    def _left(self, tokens: int) -> float:
        """FLOPs that the race may still take after the heat of `tokens`."""
        spent = [trial for trial in self.trials if trial.tokens <= tokens and trial.name in self.records]
        # Exact sums, so that the order of records decides nothing.
        return self.race.share * math.fsum(map(self._flops, self.trials)) - math.fsum(map(self._flops, spent))


def _scale(record: RunRecord) -> int:
    if not record.teacher_scale:
        raise StudyError(f"{record.run}: its record does not say its teacher's scale, without which there is no race")
    return record.teacher_scale


def _at_full_rate(row: Mapping[str, float], recipe: Mapping[str, Any]) -> bool:
    """Whether a point is of the constant part of `wsd`, which runs of more tokens share."""
    return recipe.get("schedule") == "wsd" and "lr" in row and math.isclose(row["lr"], recipe["lr"])


@dataclass(frozen=True)
class Replayed:
    """What a race would have come to, beside the full grid that was run.

    Attributes:
        student, condition: whose race; seeds: of the longest heat; tokens: its heats.
        heats: the teachers that ran each.
        teacher, loss: the winner, the lowest at the largest budget; nats per token, the mean over its seeds.
        best_teacher, best_loss: of the full grid.
        share: of the full grid's FLOPs that the race took, the pretraining of teachers aside.
    """

    student: str
    condition: str
    seeds: tuple[int, ...]
    tokens: tuple[int, ...]
    heats: tuple[tuple[str, ...], ...]
    teacher: str
    loss: float
    best_teacher: str
    best_loss: float
    share: float

    @property
    def above(self) -> float:
        """How far the winner's loss is above the full grid's best, as a share of it."""
        return self.loss / self.best_loss - 1


def replay(records: Sequence[RunRecord], race: Race | None = None) -> list[Replayed]:
    """Races on the records of full grids, with nothing shown before it would have been run.

    One for each student and condition whose teachers are each their own start, and for each two or more budgets that
    all its teachers were run at: the longest of them, and each shorter one in its place. Of a budget those seeds count
    with which all teachers were run.
    """
    coupled = [record for record in records if record.kind == "distill" and record.start == record.teacher]
    found = []
    for group in dict.fromkeys((r.student_scale, r.student, r.condition) for r in sorted(coupled, key=_place)):
        mine = [r for r in coupled if (r.student_scale, r.student, r.condition) == group]
        teachers = {r.teacher for r in mine}
        heats = [
            heat
            for tokens in sorted({r.tokens for r in mine})
            if (heat := _full(teachers, [r for r in mine if r.tokens == tokens]))
        ]
        for last in range(1, len(heats) if len(teachers) > 1 else 0):
            found.append(_replayed(heats[: last + 1], race or Race()))
    return found


def _place(record: RunRecord) -> tuple[int, str, str, int]:
    return record.student_scale, record.student, record.condition, record.seed


def _full(teachers: Collection[str | None], records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those of the seeds with which all teachers were run."""
    ran = {seed: {r.teacher for r in records if r.seed == seed} for seed in {r.seed for r in records}}
    return [r for r in records if ran[r.seed] == teachers]


def _replayed(grid: Sequence[Sequence[RunRecord]], race: Race) -> Replayed:
    """`grid`: the records of each heat."""
    records = [record for heat in grid for record in heat]
    by_name = {record.run: record for record in records}
    raced = Raced(**race.model_dump(), coupled=True)
    # A trunk is whatever run of the grid spared the tokens that the record says.
    names = {(r.teacher, r.seed, r.tokens): r.run for r in records}
    budgets = [heat[0].tokens for heat in grid]
    trials = [
        Trial(
            name=r.run,
            kind="distill",
            student=0,
            start=r.start,
            teacher=r.teacher,
            seed=r.seed,
            tokens=r.tokens,
            trunk=trunk if r.tokens_taken_over else None,
            taken_over=r.tokens_taken_over if trunk else 0,
            race=raced,
        )
        for r in records
        for trunk in [_trunk(r, names, budgets)]
    ]
    shown: dict[str, RunRecord] = {}
    while True:
        verdicts = judge(trials, shown, ())
        runs = by_name.keys() - shown.keys() - verdicts.stopped.keys() - verdicts.held
        if not runs:
            break
        shown |= {name: by_name[name] for name in runs}
    ran = [[r for r in heat if r.run in shown] for heat in grid]
    (best, best_loss), (winner, loss) = _lowest(grid[-1]), _lowest(ran[-1])
    first = records[0]
    return Replayed(
        student=first.student,
        condition=first.condition,
        seeds=tuple(sorted({r.seed for r in grid[-1]})),
        tokens=tuple(budgets),
        heats=tuple(tuple(_by_scale(heat)) for heat in ran),
        teacher=winner,
        loss=loss,
        best_teacher=best,
        best_loss=best_loss,
        share=math.fsum(r.flops_spent for r in shown.values()) / math.fsum(r.flops_spent for r in records),
    )


def _trunk(record: RunRecord, names: Mapping[Any, str], budgets: Sequence[int]) -> str | None:
    """The run of the same teacher and seed with the most tokens that are fewer, if there is one."""
    known = [names.get((record.teacher, record.seed, tokens)) for tokens in budgets if tokens < record.tokens]
    return next((name for name in reversed(known) if name), None)


def _lowest(heat: Sequence[RunRecord]) -> tuple[str, float]:
    """The teacher with the lowest mean loss, and that; nats per token."""
    losses = {name: statistics.fmean(r.loss for r in heat if r.teacher == name) for name in _by_scale(heat)}
    return min(losses.items(), key=lambda item: item[1])


def _by_scale(heat: Sequence[RunRecord]) -> list[str]:
    """The names of its teachers, from small to large."""
    return list(dict.fromkeys(str(r.teacher) for r in sorted(heat, key=lambda r: r.teacher_scale or 0)))
