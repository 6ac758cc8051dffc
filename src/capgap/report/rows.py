"""What a report shows, taken out of run records: observations, roles, tables, statements."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from capgap.law import LawFit, Observation, StudentOptimum, published_teacher, scale_text
from capgap.law.optimum import TEACHERS_NEEDED
from capgap.records import RunRecord

Row = dict[str, str]


def is_coupled(record: RunRecord) -> bool:
    """Distilled from the model it was cut from: the paper's way; the law is fitted to these runs alone."""
    return record.kind == "distill" and record.teacher is not None and record.start == record.teacher


def is_apart(record: RunRecord) -> bool:
    """Distilled from another model than the one it was cut from."""
    return record.kind == "distill" and record.start != record.teacher


UNKNOWN = 1
"""Tokens of a run that nobody told."""


def budget_names(records: Sequence[RunRecord]) -> dict[str, str]:
    """The budget of each run: its tokens, such as `3M tokens`.

    Where those differ from student to student more than tokens per parameter do, these: `30 tokens per parameter`.
    """
    if all(r.tokens == UNKNOWN for r in records):
        return dict.fromkeys((r.run for r in records), "any tokens")
    scales = student_scales(records)
    ratios = {r.run: float(f"{r.tokens / scales[r.run][0]:.2g}") for r in records}
    per_parameter = len(set(ratios.values())) < len({r.tokens for r in records})
    unit = "tokens per parameter" if per_parameter else "tokens"
    return {r.run: f"{scale_text(ratios[r.run] if per_parameter else r.tokens)} {unit}" for r in records}


def by_budget(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs of the paper's way by their budgets, from few tokens to many; those under a condition are left out."""
    mine = [r for r in records if is_coupled(r) and not r.condition]
    names = budget_names(mine)
    found: dict[str, list[RunRecord]] = {}
    for r in sorted(mine, key=lambda r: r.tokens):
        found.setdefault(names[r.run], []).append(r)
    order = {name: min(r.tokens for r in rows) for name, rows in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: order[name])}


SAME = 1.05
"""Up to which factor between its largest and smallest scale a student of one name is one student."""


def observations_of(records: Sequence[RunRecord]) -> list[Observation]:
    """The runs of the paper's way as observations: scales in parameters, losses in nats per token.

    A student may differ a little in scale from one start to another, as where heads cannot be cut alike: then it counts
    at the geometric mean, with how far its scales scatter.
    """
    mine = [r for r in records if is_coupled(r) and r.teacher_scale is not None and not r.condition]
    scales = student_scales(mine)
    return [Observation(scales[r.run][0], float(r.teacher_scale or 0), r.loss, r.seed, scales[r.run][1]) for r in mine]


def student_tokens(records: Sequence[RunRecord]) -> dict[float, float]:
    """The tokens of a budget's runs by the scale that their student counts at; a geometric mean where they differ."""
    scales, found = student_scales(records), {}
    for r in records:
        found.setdefault(scales[r.run][0], []).append(r.tokens)
    return {scale: statistics.geometric_mean(tokens) for scale, tokens in found.items()}


def student_scales(records: Sequence[RunRecord]) -> dict[str, tuple[float, float]]:
    """Of each run, by its name, the scale that its student counts at, and the standard deviation of its logarithm."""
    named: dict[str, set[int]] = {}
    for r in records:
        named.setdefault(r.student, set()).add(r.student_scale)
    found = {}
    for r in records:
        logs = [math.log(scale) for scale in named[r.student]]
        if len(logs) == 1 or max(logs) - min(logs) > math.log(SAME):
            found[r.run] = float(r.student_scale), 0.0
        else:
            found[r.run] = math.exp(statistics.mean(logs)), statistics.stdev(logs)
    return found


def fittable(observations: Sequence[Observation]) -> tuple[list[Observation], list[float]]:
    """Observations of the students with enough teachers for an optimum, and the scales of the others."""
    teachers: dict[float, set[float]] = {}
    for o in observations:
        teachers.setdefault(o.student, set()).add(o.teacher)
    short = sorted(s for s, found in teachers.items() if len(found) < TEACHERS_NEEDED)
    return [o for o in observations if o.student not in short], short


def names_of(records: Sequence[RunRecord]) -> dict[float, str]:
    """The name of each student by its scale; several names of one scale are joined."""
    names: dict[float, list[str]] = {}
    scales = student_scales([r for r in records if is_coupled(r)])
    for r in records:
        for scale in {float(r.student_scale), scales.get(r.run, (float(r.student_scale),))[0]}:
            known = names.setdefault(scale, [])
            if r.student not in known:
                known.append(r.student)
    return {scale: " / ".join(known) for scale, known in names.items()}


@dataclass(frozen=True)
class RoleBar:
    """One way to make a student, and the held-out losses it reached (nats per token, one per seed)."""

    label: str
    tag: str
    kind: Literal["scratch", "coupled", "apart"]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean loss over seeds, nats per token."""
        return math.fsum(self.losses) / len(self.losses)


def role_bars(records: Sequence[RunRecord], law: LawFit | None) -> list[RoleBar]:
    """The ways one student was made, best last: from scratch, under chosen teachers, with the roles apart.

    Of the coupled runs only three are kept, under the teacher nearest (by factor) to the law's, the one
    published law's pick's and the largest; the figure of losses over teachers has them all.
    """
    groups: dict[tuple[str, str | None, str | None], list[RunRecord]] = {}
    for r in records:
        if r.kind != "pretrain":
            groups.setdefault((r.kind, r.start, r.teacher), []).append(r)
    tags = _tags([group[0] for group in groups.values() if is_coupled(group[0])], law)
    bars = []
    for (kind, start, teacher), group in groups.items():
        losses = tuple(r.loss for r in group)
        if kind == "scratch":
            bars.append(RoleBar("from scratch", "no teacher", "scratch", losses))
        elif is_coupled(group[0]):
            if teacher in tags:
                bars.append(RoleBar(f"cut from and taught by {teacher}", tags[teacher], "coupled", losses))
        else:
            origin = f"cut from {start}" if start else "random start"
            bars.append(RoleBar(f"{origin}, taught by {teacher}", "roles apart", "apart", losses))
    return sorted(bars, key=lambda bar: -bar.mean)


def _tags(coupled: Sequence[RunRecord], law: LawFit | None) -> dict[str | None, str]:
    """Why a coupled run is shown, by teacher name."""
    scales = {r.teacher: float(r.teacher_scale) for r in coupled if r.teacher_scale}
    if not scales:
        return {}
    student = float(coupled[0].student_scale)
    wanted = {"published law's pick": published_teacher(student).teacher}
    if law is not None and law.ratio is not None:
        wanted = {"this law's pick": law.predict(student).teacher} | wanted
    wanted["largest teacher"] = max(scales.values())
    tags: dict[str | None, str] = {}
    for tag, target in wanted.items():
        name = min(scales, key=lambda n: abs(math.log(scales[n] / target)))
        tags[name] = f"{tags[name]}, {tag}" if name in tags else tag
    return tags


def optimum_rows(law: LawFit, names: dict[float, str]) -> list[Row]:
    """One row per student: its optimal teacher, the interval, and whether it is censored."""
    rows = []
    for row in law.optima:
        found = row.optimum
        bounds = "none"
        if row.low is not None and row.high is not None:
            bounds = f"{scale_text(row.low)} to {scale_text(row.high)}"
        edge = {"low": "at most ", "high": "at least "}.get(found.censored or "", "")
        rows.append(
            {
                "student": names.get(row.student, scale_text(row.student)),
                "parameters": f"{row.student:,.0f}",
                "optimal teacher": edge + scale_text(found.teacher),
                f"{law.level:.0%} interval": bounds,
                "T*/S": edge + f"{found.teacher / row.student:.2f}",
                "loss there": f"{found.loss:.4f}",
                "turn": f"{scale_text(found.turn[0])} to {scale_text(found.turn[1])}",
                "status": _status(row),
                "teachers": str(len(found.grid)),
            }
        )
    return rows


def _status(row: StudentOptimum) -> str:
    found = row.optimum
    if not found.censored:
        return "inside the grid"
    return f"censored at the {found.censored} edge" if found.at_edge else "a bound: inside, but no parabola"


def law_rows(law: LawFit) -> list[Row]:
    """This law beside the published one."""
    return [
        {"quantity": b.quantity, "here": b.here, "published": b.published, "reading": b.reading}
        for b in law.beside_published()
    ]


def run_rows(records: Sequence[RunRecord]) -> list[Row]:
    """One row per run, ordered by student, kind, start and teacher."""

    def order(r: RunRecord) -> tuple[int, str, int, int, int]:
        return r.student_scale, r.kind, r.teacher_scale or 0, r.start_scale or 0, r.seed

    return [
        {
            "run": r.run,
            "kind": "roles apart" if is_apart(r) else r.kind,
            "student": f"{r.student} ({scale_text(r.student_scale)})",
            "start": _model(r.start, r.start_scale),
            "teacher": _model(r.teacher, r.teacher_scale),
            "seed": str(r.seed),
            "tokens": scale_text(r.tokens),
            "loss at start": "" if r.start_loss is None else f"{r.start_loss:.4f}",
            "loss": f"{r.loss:.4f}",
            "bits/byte": f"{r.bits_per_byte:.4f}",
            "FLOPs": f"{r.flops:.2e}",
            "seconds": f"{r.seconds:,.0f}",
        }
        for r in sorted(records, key=order)
    ]


def _model(name: str | None, scale: int | None) -> str:
    return "none" if name is None else name if scale is None else f"{name} ({scale_text(scale)})"


def provenance_rows(records: Sequence[RunRecord], law: LawFit | None) -> list[Row]:
    """Where the numbers come from: versions, data, seeds, devices, recipes."""
    values: dict[str, set[str]] = {"device": set(), "data hash": set(), "seeds": set(), "recipes": set()}
    for r in records:
        values["device"].add(r.device)
        values["data hash"].add(r.data_hash)
        values["seeds"].add(str(r.seed))
        values["recipes"].add(r.recipe_hash[:12])
        for name, version in r.versions.items():
            values.setdefault(f"version of {name}", set()).add(version)
    rows = [{"what": name, "value": ", ".join(sorted(found, key=_natural))} for name, found in values.items()]
    hours = sum(r.seconds for r in records) / 3600
    rows.append({"what": "runs", "value": f"{len(records)}, {hours:,.2f} hours of training in all"})
    if law is not None:
        rows.append(
            {
                "what": "bootstrap",
                "value": f"{law.replicates} replicates, seed {law.seed}, {law.level:.0%} percentile intervals",
            }
        )
    return rows


def _natural(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (-1, text)


def measured(records: Sequence[RunRecord], law: LawFit | None) -> list[str]:
    """What was and was not measured, one sentence each, from the records and the law alone."""
    coupled = [r for r in records if is_coupled(r)]
    lines = []
    if coupled:
        students, teachers = [r.student_scale for r in coupled], [r.teacher_scale or 0 for r in coupled]
        seeds = len({r.seed for r in coupled})
        lines.append(
            f"Measured: held-out loss, in nats per token, of {len(coupled)} distilled runs: "
            f"{len(set(students))} student scale{'s' * (len(set(students)) > 1)} ({_range(students)}), "
            f"teachers of {_range(teachers)}, {seeds} seed{'s' * (seeds > 1)}, "
            f"{_range([r.tokens for r in coupled])} tokens a run."
        )
        if seeds == 1:
            lines.append("Every point is one run with one seed: how much another seed would move it was not measured.")
    lines.append("Not measured: tasks of any kind. A lower held-out loss is all that better means here.")
    if coupled and max(r.student_scale for r in coupled) < 28e6:
        lines.append(
            "These students are smaller than any in the published pilot study (about 28M parameters and up): "
            "agreement or disagreement here says little about large models."
        )
    if len({r.data_hash for r in coupled}) > 1:
        lines.append("The runs differ in data, so their losses do not compare exactly.")
    if len({r.tokens for r in coupled}) > 1:
        lines.append("The runs differ in tokens trained on, so their losses do not compare exactly.")
    if any(is_apart(r) for r in records):
        lines.append("Runs whose start is another model than the teacher are shown apart; they do not enter the law.")
    return lines + [f"{note[:1].upper()}{note[1:]}." for note in (law.notes if law else ())]


def _range(values: Sequence[int]) -> str:
    low, high = scale_text(min(values)), scale_text(max(values))
    return low if low == high else f"{low} to {high}"
