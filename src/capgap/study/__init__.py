"""Studies: grids of (start, teacher, student, seed) that survive being killed and end in a law."""

from capgap.study.grid import Member, Nano, Roles, StudySpec, Trial, trials_of
from capgap.study.storage import Queue, read_records
from capgap.study.worker import Status, run_study, study_status

__all__ = [
    "Member",
    "Nano",
    "Queue",
    "Roles",
    "Status",
    "StudySpec",
    "Trial",
    "read_records",
    "run_study",
    "study_status",
    "trials_of",
]
