"""The demo: the law of capacity gap measured on the Python standard library, with no network and no GPU."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from capgap.cost import format_count
from capgap.errors import LawError
from capgap.law import LawFit, published_teacher
from capgap.progress import say
from capgap.recipe import check
from capgap.records import RunRecord
from capgap.report import Report, law_of, write_report
from capgap.study import Family, Grid, StudySpec, run_study
from capgap.study.spec import NONE, RANDOM

# Learning rates fall with width. Shallow, wide models and many small steps win at so few tokens.
_MEMBERS = [
    {"hidden": 32, "neurons": 88, "lr": 6e-3},
    {"hidden": 48, "neurons": 128, "lr": 5e-3},
    {"hidden": 80, "neurons": 216, "lr": 4e-3},
    {"hidden": 128, "neurons": 344, "lr": 1.5e-3},
]
_LARGE_MEMBER = {"hidden": 192, "neurons": 512, "lr": 1.2e-3}
_STUDENTS = [{"hidden": 16, "kv_heads": 1, "neurons": 44}, {"hidden": 24, "kv_heads": 1, "neurons": 64}]
_LARGE_STUDENT = {"hidden": 32, "kv_heads": 2, "neurons": 88}
_NOT_IN_GRID = {"hidden": 20, "kv_heads": 1, "neurons": 54}


@dataclass(frozen=True)
class DemoResult:
    """The report, and one line for each thing that was found."""

    report: Report
    findings: list[str]


def demo_spec(*, full: bool, tokens: int | None = None) -> StudySpec:
    """The demo's study: four teachers and two students; with `full` five, three, more tokens and two seeds."""
    count = tokens or (1_500_000 if full else 800_000)
    loop = {
        "tokens": count,
        "tokens_per_step": min(1024, count),
        "checkpoint_every": 15,
        "evaluations": 3,
        "warmup": 0.05,
        "log_every": 100,
    }
    stdlib = {"python_stdlib": True}
    return check(
        {
            "data": {
                "train": {**stdlib, "part": "train"},
                "held_out": {**stdlib, "part": "held-out"},
                "block": 128,
            },
            "nano": {
                "members": [*_MEMBERS, *([_LARGE_MEMBER] if full else [])],
                "pretrain": {**loop, "lr": 3e-3},
            },
            "students": [*_STUDENTS, *([_LARGE_STUDENT] if full else [])],
            "seeds": [0, 1] if full else [0],
            # As in the paper.
            "prune": {
                "score": "expressiveness",
                "calibration_tokens": 65_536,
                "calibration_batch": 32,
                "repair": "none",
            },
            "distill": {**loop, "lr": 5e-3},
            "evaluate": {"tokens": 40_000},
            "train_tokens": max(2 * count, 200_000),
        },
        StudySpec,
        "the demo",
    )


def run_demo(folder: Path, *, full: bool = False, tokens: int | None = None, workers: int = 2) -> DemoResult:
    """Pretrains the family, distils the grid, fits the law, tests its pick, and writes the report into `folder`.

    Goes on where it was, if it was stopped.

    Args:
        tokens: of each run, instead of the demo's own count.
        workers: processes that share the cores.
    """
    grid = demo_spec(full=full, tokens=tokens)
    say(
        f"The law of capacity gap, measured: {len(Family(grid).models)} teachers, {len(grid.students)} students, "
        f"{format_count(grid.distill.tokens)} tokens a run, {len(grid.seeds)} seed(s). All of it goes to {folder}."
    )
    records = run_study(grid, folder, workers=workers, again=True)
    statements = [family_statement(records)]
    law = _law_if_any(records)

    # The pick is tested on a student that the law has not seen.
    index = len(grid.students)
    spec = grid.model_copy(update={"students": [*grid.students, check(_NOT_IN_GRID, type(grid.students[0]), "demo")]})
    family = Family(spec)
    student, name = family.scales[index], family.student_names[index]
    scales = {model.name: model.scale for model in family.models.values()}
    pick, why = pick_teacher(law, student, scales)
    largest, nearest = max(scales, key=scales.__getitem__), min(scales, key=scales.__getitem__)
    ways = [(pick, pick), (largest, largest), (nearest, largest), (RANDOM, NONE)]
    grids = [Grid(students=[index], starts=[start], teachers=[teacher]) for start, teacher in ways]
    spec = spec.model_copy(update={"grids": [Grid(students=list(range(index))), *grids]})
    say(f"{name} was not in the grid: {why}")
    everything = run_study(spec, folder, workers=workers, again=True)
    tested = [r for r in everything if r.student == name]
    statements += [
        why,
        (
            f"One text, {'two seeds' if full else 'one seed'}, {format_count(grid.distill.tokens)} tokens a run at "
            "nano scale: the intervals are wide, and nothing here is evidence about models of billions of parameters."
        ),
    ]
    in_grid = [r for r in everything if r.student != name]
    report = write_report(
        in_grid,
        folder / "report",
        title="The law of capacity gap, measured on this machine",
        statements=statements,
        law=law,
        comparison=tested,
    )
    return DemoResult(report, [*statements, *findings(tested, pick, largest, nearest)])


def _law_if_any(records: list[RunRecord]) -> LawFit | None:
    try:
        return law_of(records)
    except LawError as error:
        say(f"no law: {error}")
        return None


def pick_teacher(law: LawFit | None, student: int, scales: dict[str, int]) -> tuple[str, str]:
    """The member nearest to what the law asks for, by ratio, and a sentence that says so.

    Where this study gave no law the published one is asked.
    """
    larger = {name: scale for name, scale in scales.items() if scale > student}
    if law is not None and law.status != "none":
        asked, source = law.predict(student), f"the law measured here ({law.status})"
        wanted, ratio = asked.teacher, asked.ratio
    else:
        published = published_teacher(student)
        wanted, ratio, source = (
            published.teacher,
            published.ratio,
            "the published law (no optimum inside the grid here)",
        )
    wanted = min(max(wanted, student), max(larger.values()))
    pick = min(larger, key=lambda name: max(larger[name] / wanted, wanted / larger[name]))
    return pick, (
        f"For a student of {format_count(student)}, {source} asks for a teacher of "
        f"{format_count(round(wanted))} ({ratio:.1f} times the student); the nearest member is {pick}."
    )


def family_statement(records: list[RunRecord]) -> str:
    """Whether the held-out loss of the family falls with scale, as it must for the law to be seen."""
    family = sorted((r for r in records if r.kind == "pretrain"), key=lambda r: r.student_scale)
    shown = ", ".join(f"{r.student} {r.loss:.3f}" for r in family)
    falls = all(a.loss > b.loss for a, b in itertools.pairwise(family))
    if falls:
        return f"The family's held-out loss falls with scale, as it must: {shown} nats per token."
    return (
        f"The family's held-out loss does not fall with scale throughout: {shown} nats per token. Such a family "
        "teaches little about the law; more tokens would be needed."
    )


def findings(tested: list[RunRecord], pick: str, largest: str, nearest: str) -> list[str]:
    """The four ways to make the student that was not in the grid, best first."""

    def way(r: RunRecord) -> str:
        if r.teacher is None:
            return "from scratch, without a teacher"
        if r.start != r.teacher:
            return f"cut from the near {r.start}, taught by the large {r.teacher}"
        names = [text for name, text in ((pick, "the law's pick"), (largest, "the largest")) if r.teacher == name]
        return f"cut from and taught by {r.teacher} ({', '.join(names)})"

    return [f"{r.loss:.4f} nats per token: {r.student} {way(r)}" for r in sorted(tested, key=lambda r: r.loss)]
