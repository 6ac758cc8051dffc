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
from capgap.study.choice import best_set
from capgap.study.forecast import Forecast, Point, forecast
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
        Heats(race, _members(trials, key, race), records, failed).judge(found)
    return found


def may_be_stopped(trials: Sequence[Trial]) -> set[str]:
    """Names of the trials that a race may stop: those that are not of its first heat."""
    found = set()
    for key, race in {_key(trial, trial.race): trial.race for trial in trials if trial.race}.items():
        members = _members(trials, key, race)
        first = min(trial.tokens for trial in members)
        found |= {trial.name for trial in members if trial.race and trial.tokens > first}
    return found


def _members(trials: Sequence[Trial], key: object, race: Raced) -> list[Trial]:
    """The trials of a race, and those of the same teachers that are run in any case: they count in it."""
    return [t for t in trials if t.kind == "distill" and t.race in (None, race) and _key(t, race) == key]


def _key(trial: Trial, race: Raced) -> object:
    """What the trials of one race have in common; trials that are not stopped may run in it too."""
    start = ("teacher" if trial.start == trial.teacher else None) if race.coupled else ("start", trial.start)
    same = trial.student, trial.condition, repr(trial.distill), repr(trial.prune)
    return *same, start, race.model_dump_json()


class Heats:
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
        order, seen = self.forecast(tokens)
        if not ran or seen is None:
            return {}
        best = min(ran, key=lambda teacher: seen.loss_N[order.index(teacher)])
        above_N, error_N = seen.above(order.index(best))
        above = {teacher: float(above_N[order.index(teacher)]) for teacher in ran}
        error = {teacher: float(error_N[order.index(teacher)]) for teacher in ran}
        heat = [(trial.teacher, self.records[trial.name].loss) for trial in self._of(tokens) if trial.teacher in ran]
        lowest = min(statistics.fmean(loss for name, loss in heat if name == teacher) for teacher in ran)
        margin = self.race.tolerance * lowest
        hopeful = [teacher for teacher in ran if above[teacher] - OPTIMISM * error[teacher] <= margin]
        kept = self._chosen(order, seen, hopeful, tokens, further)
        when = f"after {format_count(tokens)} tokens its loss at {format_count(self.target)} is forecast"
        reasons = {}
        for teacher in set(ran) - kept:
            reasons[teacher] = f"{when} {above[teacher]:.4f} ± {error[teacher]:.4f} nats above that of {best}"
            if teacher in hopeful:
                share = f"{100 * self.race.share:g} % of the grid's FLOPs"
                reasons[teacher] += f"; the race may take {share}, and what is left of them is better spent on others"
                if teacher == best:
                    reasons[teacher] = f"{when} to be the lowest, but of {share} too little is left for it"
        return reasons

    def forecast(self, tokens: int) -> tuple[list[str | None], Forecast | None]:
        """The teachers, and what is forecast after the heat of `tokens` of their losses at the largest budget."""
        order = sorted(self.scales, key=lambda teacher: (self.scales[teacher], teacher or ""))
        scales = tuple(float(self.scales[teacher]) for teacher in order)
        return order, forecast(scales, self._points(order, tokens), self.target)

    def _chosen(
        self, order: Sequence[str | None], seen: Forecast, hopeful: Sequence[str | None], tokens: int, further: int
    ) -> set[str | None]:
        """Those that run the heat of `further`; where nobody can be paid for to the end, the one that costs least."""
        heat, ahead = self._of(further), [trial for trial in self.trials if trial.tokens > tokens]
        left = self._left(tokens) - math.fsum(self._flops(trial) for trial in ahead if not trial.race)
        now, whole = self._cost(heat), self._cost(ahead)
        runners = tuple(sorted(map(order.index, hopeful)))
        now_R, whole_R = (tuple(flops.get(order[runner], 0.0) for runner in runners) for flops in (now, whole))
        cheapest = runners[whole_R.index(min(whole_R))]
        kept = {order[runner] for runner in best_set(seen, runners, now_R, whole_R, left) or (cheapest,)}
        return kept | ({trial.teacher for trial in heat} - {trial.teacher for trial in heat if trial.race})

    def _cost(self, trials: Sequence[Trial]) -> dict[str | None, float]:
        """FLOPs of each teacher's trials of these that a race may stop."""
        found: dict[str | None, list[float]] = {}
        for trial in trials:
            found.setdefault(trial.teacher, []).append(self._flops(trial) if trial.race else 0.0)
        return {teacher: math.fsum(flops) for teacher, flops in found.items()}

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
