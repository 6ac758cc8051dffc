"""Races on the records of full grids: what they would have found and saved, and how right their forecasts were."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capgap.records import RunRecord
from capgap.study.race import Heats, judge
from capgap.study.spec import Race
from capgap.study.trials import Raced, Trial


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
    return [_replayed(grid, race or Race()) for grid in _grids(records)]


@dataclass(frozen=True)
class ForecastError:
    """How far a race's forecast was off: of how many teachers' losses, so many times the tokens ahead.

    Attributes:
        times: tokens forecast over tokens measured.
        error: root mean square of the differences from the best forecast, measured less forecast, nats per token.
        in_errors: the same in units of the standard errors that the forecast gave; 1 where these are right.
    """

    times: float
    teachers: int
    error: float
    in_errors: float


def forecast_errors(records: Sequence[RunRecord]) -> list[ForecastError]:
    """How right the forecasts of races were, of all full grids after each of their heats."""
    found = []
    for grid in _grids(records):
        trials, by_name = _trials(grid, Race())
        heats = Heats(Raced(coupled=True), trials, by_name, ())
        final = {name: statistics.fmean(r.loss for r in grid[-1] if r.teacher == name) for name in _by_scale(grid[-1])}
        for heat in grid[:-1]:
            order, seen = heats.forecast(heat[0].tokens)
            if seen is None:
                continue
            best = int(seen.loss_N.argmin())
            above_N, error_N = seen.above(best)
            off = [
                (final[str(name)] - final[str(order[best])] - above, error)
                for name, above, error in zip(order, above_N, error_N, strict=True)
                if name != order[best]
            ]
            found.append(
                ForecastError(
                    grid[-1][0].tokens / heat[0].tokens,
                    len(off),
                    math.sqrt(statistics.fmean(gap**2 for gap, _ in off)),
                    math.sqrt(statistics.fmean((gap / error) ** 2 for gap, error in off)),
                )
            )
    return found


def _grids(records: Sequence[RunRecord]) -> list[list[list[RunRecord]]]:
    """Of each student and condition the records of each heat, for each budget that may be the last."""
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
        found += [heats[: last + 1] for last in range(1, len(heats) if len(teachers) > 1 else 0)]
    return found


def _place(record: RunRecord) -> tuple[int, str, str, int]:
    return record.student_scale, record.student, record.condition, record.seed


def _full(teachers: Collection[str | None], records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those of the seeds with which all teachers were run."""
    ran = {seed: {r.teacher for r in records if r.seed == seed} for seed in {r.seed for r in records}}
    return [r for r in records if ran[r.seed] == teachers]


def _trials(grid: Sequence[Sequence[RunRecord]], race: Race) -> tuple[list[Trial], dict[str, RunRecord]]:
    """The trials that the records of each heat are of, all in one race, and their records by their names."""
    records = [record for heat in grid for record in heat]
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
            race=Raced(**race.model_dump(), coupled=True),
        )
        for r in records
        for trunk in [_trunk(r, names, budgets)]
    ]
    return trials, {r.run: r for r in records}


def _replayed(grid: Sequence[Sequence[RunRecord]], race: Race) -> Replayed:
    """`grid`: the records of each heat."""
    trials, by_name = _trials(grid, race)
    shown: dict[str, RunRecord] = {}
    while True:
        verdicts = judge(trials, shown, ())
        runs = by_name.keys() - shown.keys() - verdicts.stopped.keys() - verdicts.held
        if not runs:
            break
        shown |= {name: by_name[name] for name in runs}
    ran = [[r for r in heat if r.run in shown] for heat in grid]
    (best, best_loss), (winner, loss) = _lowest(grid[-1]), _lowest(ran[-1])
    first = grid[0][0]
    return Replayed(
        student=first.student,
        condition=first.condition,
        seeds=tuple(sorted({r.seed for r in grid[-1]})),
        tokens=tuple(heat[0].tokens for heat in grid),
        heats=tuple(tuple(_by_scale(heat)) for heat in ran),
        teacher=winner,
        loss=loss,
        best_teacher=best,
        best_loss=best_loss,
        share=math.fsum(r.flops_spent for r in shown.values()) / math.fsum(r.flops_spent for r in by_name.values()),
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
