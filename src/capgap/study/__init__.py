"""Studies: grids of (start, teacher, student, tokens, seed) that survive being killed and end in a law."""

from capgap.study.estimate import Cost, estimate_study
from capgap.study.export import export_records, rows_of
from capgap.study.family import Family, Model
from capgap.study.folder import read_spec
from capgap.study.queue import Claim, Queue, read_records
from capgap.study.spec import Budget, Grid, Member, Nano, StudentSize, StudySpec
from capgap.study.trials import Trial, trials_of
from capgap.study.worker import Status, StudyStopped, Way, create_study, run_study, study_status

__all__ = [
    "Budget",
    "Claim",
    "Cost",
    "Family",
    "Grid",
    "Member",
    "Model",
    "Nano",
    "Queue",
    "Status",
    "StudentSize",
    "StudySpec",
    "StudyStopped",
    "Trial",
    "Way",
    "create_study",
    "estimate_study",
    "export_records",
    "read_records",
    "read_spec",
    "rows_of",
    "run_study",
    "study_status",
    "trials_of",
]
