"""A study's report: figures as PNG files, one page, and a table for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as TerminalTable

from capgap.errors import LawError
from capgap.law import PUBLISHED, LawFit, Observation, fit_law, scale_text
from capgap.records import RunRecord
from capgap.report import figures
from capgap.report.interactive import curve_plot, law_plot, loss_plot, optimum_words, roles_plot
from capgap.report.page import Figure, Table, write_page
from capgap.report.rows import (
    RoleBar,
    Row,
    by_budget,
    fittable,
    is_coupled,
    law_rows,
    measured,
    names_of,
    observations_of,
    optimum_rows,
    provenance_rows,
    role_bars,
    run_rows,
)

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written: the page, the PNG files, the law (None if none was fitted), the optima's rows."""

    page: Path
    figures: tuple[Path, ...]
    law: LawFit | None
    table_rows: tuple[Row, ...]


def write_report(
    records: Sequence[RunRecord],
    folder: Path,
    *,
    title: str,
    statements: Sequence[str] = (),
    law: LawFit | None = None,
    comparison: Sequence[RunRecord] = (),
) -> Report:
    """Fits the law to the coupled runs and writes `report.html` and PNG figures into `folder`.

    The law rests on the distilled runs of `records` whose start is their teacher. Where none can be fitted
    the report is written all the same, and says why.

    Args:
        records: a study's runs, at least one.
        folder: made if it is not there; each file is replaced whole.
        title: of the page.
        statements: what its author knows about what was measured; printed before what the records tell.
        law: a law fitted before; None to fit one here.
        comparison: further runs for the comparison of roles (from scratch, roles apart); without them those
            among `records` are compared.
    Raises: LawError if there are no records at all; StorageError if `folder` cannot be written.
    """
    if not records:
        raise LawError("a report needs at least one run record; found none")
    folder, observations, names = Path(folder), observations_of(records), names_of(records)
    everything = list({r.run: r for r in [*records, *comparison]}.values())
    said = list(statements)
    budgets = by_budget(records)
    if len(budgets) > 1:
        budget = max(reversed(budgets), key=lambda name: len(budgets[name]))
        others = ", ".join(f"{name} ({len(runs)} runs)" for name, runs in budgets.items() if name != budget)
        said.append(f"The law and the losses over teachers are those at {budget}; there are also runs at {others}.")
        chosen = {r.run for r in budgets[budget]}
        records = [r for r in records if not is_coupled(r) or r.run in chosen]
        observations = observations_of(records)
    if law is None:
        law, reasons = _fit(records)
        said += reasons
    said += measured(everything, law)
    roles = _roles(records, comparison, law)

    written = []
    if observations:
        path = folder / "loss-against-teacher.png"
        written.append(figures.loss_against_teacher(observations, path, law=law, names=names))
    if law is not None:
        written.append(figures.law_figure(law, folder / "law.png", names=names))
    curves = figures.training_curves(everything, folder / "training-curves.png")
    written += [curves] if curves is not None else []
    for student, (_, bars) in roles.items():
        heading = f"Ways to a student of {scale_text(student)} parameters"
        written.append(figures.roles_figure(bars, folder / f"roles-{student}.png", title=heading))

    rows = optimum_rows(law, names) if law is not None else []
    page = write_page(
        folder / PAGE,
        title=title,
        lead=_lead(law),
        statements=said,
        sections=[
            *_law_sections(law, names, rows),
            *_loss_sections(observations, law, names),
            *(_role_section(name, bars) for name, bars in roles.values()),
            *_curve_sections(everything),
            Table("Every run", run_rows(everything), "Losses are held-out nats per token."),
            Table("Provenance", provenance_rows(everything, law), f"Published law: {PUBLISHED.source}."),
        ],
    )
    return Report(page, tuple(written), law, tuple(rows))


def closing_table(records: Sequence[RunRecord], law: LawFit | None) -> TerminalTable:
    """The result for the terminal: one row per student's optimum, the law below; the runs if there is no law.

    Args:
        records: give students their names.
        law: as in `Report.law`.
    """
    rows = optimum_rows(law, names_of(records)) if law is not None else run_rows(records)
    short = ["run", "kind", "student", "start", "teacher", "seed", "loss"]
    keep = list(rows[0]) if law is not None else short
    table = TerminalTable(title="optimal teachers" if law is not None else "runs", caption=_lead(law))
    for head in keep if rows else []:
        table.add_column(head, justify="left" if head in ("student", "run", "kind", "status") else "right")
    for row in rows:
        # Brackets in names would be read as markup.
        table.add_row(*(row[head].replace("[", "\\[") for head in keep))
    return table


def law_of(records: Sequence[RunRecord]) -> LawFit:
    """The law through the coupled runs of the students that have enough teachers.

    Raises: LawError if there is no such student, or the fit is refused.
    """
    enough, _ = fittable(observations_of(records))
    if not enough:
        raise LawError("no student was distilled from at least three teachers that it was also cut from")
    return fit_law(enough)


def _fit(records: Sequence[RunRecord]) -> tuple[LawFit | None, list[str]]:
    reasons = [
        f"The student of {scale_text(s)} parameters has fewer than three teachers and is left out of the law."
        for s in fittable(observations_of(records))[1]
    ]
    try:
        return law_of(records), reasons
    except LawError as error:
        return None, [*reasons, f"No law was fitted: {error}."]


def _lead(law: LawFit | None) -> str:
    if law is None:
        return "No law was fitted; the published one is T* = 2.498 S − 11.498M."
    words = figures.law_words(law).replace("\n", "; ")
    return f"{words[:1].upper()}{words[1:]}. Published: T* = 2.498 S − 11.498M, R² = {PUBLISHED.r_squared}."


def _roles(
    records: Sequence[RunRecord], comparison: Sequence[RunRecord], law: LawFit | None
) -> dict[int, tuple[str, list[RoleBar]]]:
    """Bars by student scale, for the students that were made in two ways or more, not all of them coupled."""
    chosen = {r.student_scale for r in (comparison or records) if r.kind != "pretrain"}
    names, found = names_of([*records, *comparison]), {}
    for student in sorted(chosen):
        mine = {r.run: r for r in [*records, *comparison] if r.student_scale == student}
        bars = role_bars(list(mine.values()), law)
        if len(bars) > 1 and any(bar.kind != "coupled" for bar in bars):
            found[student] = (names[float(student)], bars)
    return found


def _law_sections(law: LawFit | None, names: dict[float, str], rows: list[Row]) -> list[Figure | Table]:
    if law is None:
        return []
    caption = "Open triangles are censored: the optimum may lie beyond the teachers measured."
    return [
        Figure("The optimal teacher of each student", law_plot(law, names), caption),
        Table("Optima", rows),
        Table("This law beside the published one", law_rows(law)),
    ]


def _loss_sections(observations: Sequence[Observation], law: LawFit | None, names: dict[float, str]) -> list[Figure]:
    optima = {row.student: row for row in law.optima} if law is not None else {}
    sections = []
    for student in sorted({o.student for o in observations}):
        row = optima.get(student)
        words = f": {optimum_words(row)}" if row is not None else ""
        heading = f"Losses of {names.get(student, 'the student')}, {scale_text(student)} parameters{words}"
        sections.append(Figure(heading, loss_plot(student, observations, row)))
    return sections


def _role_section(name: str, bars: list[RoleBar]) -> Figure:
    caption = "Grey: no teacher. Blue: cut from its teacher. Red: cut from one model, taught by another."
    return Figure(f"Ways to {name}", roles_plot(bars), caption)


def _curve_sections(records: Sequence[RunRecord]) -> list[Figure]:
    trained = [r for r in records if r.kind != "pretrain"]
    sections = []
    for scale, name in sorted(names_of(trained).items()):
        if (plot := curve_plot([r for r in trained if r.student_scale == scale])) is not None:
            caption = "The first part of training is above the frame."
            sections.append(Figure(f"Training of {name}", plot, caption))
    return sections
