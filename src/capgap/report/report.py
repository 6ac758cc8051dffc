"""A study's report: figures as PNG files, one page, and a table for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as TerminalTable

from capgap.errors import LawError
from capgap.law import PUBLISHED, LawFit, Observation, fit_law, scale_text
from capgap.records import RunRecord
from capgap.report import figures
from capgap.report.analysis import Analysis, analyse
from capgap.report.interactive import curve_plot, law_plot, loss_plot, optimum_words, roles_plot
from capgap.report.maps import ratio_over_tokens, roles_heat, roles_map, tokens_plot
from capgap.report.page import Figure, Table, write_page
from capgap.report.picks import Pick, picks_of
from capgap.report.rows import (
    RoleBar,
    Row,
    budget_names,
    fittable,
    law_rows,
    measured,
    names_of,
    observations_of,
    optimum_rows,
    provenance_rows,
    role_bars,
    run_rows,
)
from capgap.report.tables import (
    budget_rows,
    condition_rows,
    hypothesis_rows,
    influence_rows,
    pick_rows,
    role_rows,
    score_rows,
    token_rows,
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
    folder, names = Path(folder), names_of(records)
    everything = list({r.run: r for r in [*records, *comparison]}.values())
    analysis = analyse(records)
    main, said = analysis.main, list(statements)
    shown = list(main.records) if main else [r for r in records if not r.condition]
    if main is not None and len(analysis.budgets) > 1:
        others = ", ".join(f"{b.name} ({len(b.records)} runs)" for b in analysis.budgets if b is not main)
        said.append(f"The law and the losses over teachers are those at {main.name}; there are also runs at {others}.")
    observations = observations_of(shown)
    if law is None:
        law, reasons = _fit(shown)
        said += reasons
    said += measured(everything, law) + list(analysis.notes)
    maps, bars = _maps(everything, analysis), _roles(records, comparison, law)
    picks = picks_of(records, analysis)

    written = []
    if observations:
        path = folder / "loss-against-teacher.png"
        written.append(figures.loss_against_teacher(observations, path, law=law, names=names))
    if law is not None:
        written.append(figures.law_figure(law, folder / "law.png", names=names))
    drawn = [ratio_over_tokens(analysis, folder / "ratio-over-tokens.png", names)]
    drawn.append(roles_map(maps, folder / "roles.png") if maps else None)
    drawn.append(figures.training_curves(_few(everything, shown), folder / "training-curves.png"))
    written += [path for path in drawn if path is not None]
    for student, (_, ways) in bars.items():
        heading = f"Ways to a student of {scale_text(student)} parameters"
        written.append(figures.roles_figure(ways, folder / f"roles-{student}.png", title=heading))

    rows = optimum_rows(law, names) if law is not None else []
    page = write_page(
        folder / PAGE,
        title=title,
        lead=_lead(law),
        statements=said,
        sections=[
            *_law_sections(law, names, rows),
            *_loss_sections(observations, law, names),
            *analysis_sections(analysis, law, picks, names),
            *(Figure(f"Start and teacher apart: {name}", roles_heat(runs), _HEAT) for name, runs in maps.items()),
            *(_role_section(name, ways) for name, ways in bars.values()),
            *_curve_sections(_few(everything, shown)),
            Table("Every run", run_rows(everything), "Losses are held-out nats per token."),
            Table("Provenance", provenance_rows(everything, law), f"Published law: {PUBLISHED.source}."),
        ],
    )
    return Report(page, tuple(written), law, tuple(rows))


_HEAT = "Mean held-out loss over seeds. Random: random weights in place of a cut; none: cross-entropy alone."
MANY = 40
"""Runs from which on only those that the law rests on, and those without a teacher, have their curves drawn."""


def _few(records: Sequence[RunRecord], shown: Sequence[RunRecord]) -> list[RunRecord]:
    trained = [r for r in records if r.kind != "pretrain"]
    if len(trained) <= MANY:
        return trained
    keep = {r.run for r in shown}
    tokens = {(r.student, r.tokens) for r in shown}
    alone = [r for r in trained if r.kind == "scratch" and not r.condition and (r.student, r.tokens) in tokens]
    return [r for r in trained if r.run in keep] + alone


def _maps(records: Sequence[RunRecord], analysis: Analysis) -> dict[str, list[RunRecord]]:
    """The runs of each student and budget whose roles were varied apart, by a title."""
    trained = [r for r in records if r.kind != "pretrain" and not r.condition]
    names, budgets = names_of(trained), budget_names([r for r in trained if r.kind == "distill" and r.start])
    found = {}
    for roles in analysis.roles:
        for surface in roles.surfaces:
            mine = [r for r in trained if r.student_scale == surface.student]
            tokens = {r.tokens for r in mine if budgets.get(r.run) == roles.name}
            title = f"{names[surface.student]}, {roles.name}"
            found[title] = [r for r in mine if r.tokens in tokens]
    return found


def analysis_sections(
    analysis: Analysis, law: LawFit | None, picks: Sequence[Pick], names: dict[float, str]
) -> list[Figure | Table]:
    """What the analysis adds to the law of one budget; only what is there."""
    found: list[Figure | Table] = []
    if len(analysis.budgets) > 1:
        caption = "Open triangles are censored. Dashed: the published 2.5 S."
        found.append(Figure("The best teacher over tokens", tokens_plot(analysis, names), caption))
        found.append(Table("The law at each budget", budget_rows(analysis), "In parentheses 95 % intervals."))
    if analysis.tokens is not None:
        inside, censored = analysis.tokens.optima
        caption = f"T* = ratio S (S/S0)^(k - 1) (D/S / d0)^g, through {inside} optima and {censored} bounds."
        found.append(Table("The law with tokens", token_rows(analysis.tokens), caption))
    if analysis.scores:
        caption = "Each student scale in turn is foretold by a law fitted to the others."
        found.append(Table("Laws compared", score_rows(analysis.scores), caption))
    if law is not None and (rows := influence_rows(law)):
        found.append(Table("The law without each student", rows))
    if analysis.tests:
        caption = "H1 and H2: a small p speaks for the hypothesis. H3: a small p speaks against it."
        found.append(Table("Hypotheses of the paper", hypothesis_rows(analysis.tests), caption))
    if rows := condition_rows(analysis.conditions, names):
        caption = "Open where the condition has students of its own."
        found.append(Table("Conditions beside the paper's way", rows, caption))
    if analysis.roles:
        caption = "The best start and teacher of the fitted surface, and the best model for both roles."
        found.append(Table("The roles apart", role_rows(analysis.roles), caption))
    if picks:
        caption = "What rules would have picked for the largest student; laws were fitted without it."
        found.append(Table("Picks", pick_rows(picks), caption))
    return found


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


MOST_BARS = 16
"""Ways to a student that are shown as bars; where there are more, a map shows them."""


def _roles(
    records: Sequence[RunRecord], comparison: Sequence[RunRecord], law: LawFit | None
) -> dict[int, tuple[str, list[RoleBar]]]:
    """Bars by student scale, for the students that were made in two ways or more, not all of them coupled."""
    chosen = {r.student_scale for r in (comparison or records) if r.kind != "pretrain"}
    names, found = names_of([*records, *comparison]), {}
    for student in sorted(chosen):
        mine = {r.run: r for r in [*records, *comparison] if r.student_scale == student}
        bars = role_bars(list(mine.values()), law)
        if MOST_BARS >= len(bars) > 1 and any(bar.kind != "coupled" for bar in bars):
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
