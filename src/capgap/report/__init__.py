"""Reports: figures, one self-contained page, and a table for the terminal."""

from capgap.report.analysis import Analysis, analyse
from capgap.report.beside import as_condition, read_studies, records_of_table
from capgap.report.figures import law_figure, loss_against_teacher, roles_figure, training_curves
from capgap.report.own import OwnLaws, own_laws_of
from capgap.report.page import write_page
from capgap.report.picks import Pick, picks_of
from capgap.report.report import Report, closing_table, law_of, write_report
from capgap.report.rows import RoleBar, by_budget, names_of, observations_of, role_bars
from capgap.report.second import second_law_of, second_lines, second_runs
from capgap.report.tables import analysis_tables

__all__ = [
    "Analysis",
    "OwnLaws",
    "Pick",
    "Report",
    "RoleBar",
    "analyse",
    "analysis_tables",
    "as_condition",
    "by_budget",
    "closing_table",
    "law_figure",
    "law_of",
    "loss_against_teacher",
    "names_of",
    "observations_of",
    "own_laws_of",
    "picks_of",
    "read_studies",
    "records_of_table",
    "role_bars",
    "roles_figure",
    "second_law_of",
    "second_lines",
    "second_runs",
    "training_curves",
    "write_page",
    "write_report",
]
