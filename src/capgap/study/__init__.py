"""Studies: grids of (start, teacher, student, tokens, seed) that survive being killed and end in a law."""

from capgap.study.estimate import Cost, estimate_study
from capgap.study.export import export_records, rows_of
from capgap.study.family import Family, Model
from capgap.study.folder import read_spec
from capgap.study.next import Advice, Proposal, flops_of_budget, next_trials
from capgap.study.queue import Claim, Queue, read_records
from capgap.study.replay import ForecastError, Replayed, forecast_errors, replay
from capgap.study.spec import Budget, Grid, Member, Nano, Race, StudentSize, StudySpec
from capgap.study.status import Status, study_status
from capgap.study.trials import Trial, trials_of
from capgap.study.worker import StudyStopped, Way, create_study, run_study

__all__ = [
    "Advice",
    "Budget",
    "Claim",
    "Cost",
    "Family",
    "ForecastError",
    "Grid",
    "Member",
    "Model",
    "Nano",
    "Proposal",
    "Queue",
    "Race",
    "Replayed",
    "Status",
    "StudentSize",
    "StudySpec",
    "StudyStopped",
    "Trial",
    "Way",
    "create_study",
    "estimate_study",
    "export_records",
    "flops_of_budget",
    "forecast_errors",
    "next_trials",
    "read_records",
    "read_spec",
    "replay",
    "rows_of",
    "run_study",
    "study_status",
    "trials_of",
]
