"""The plan: which teacher for the student, cut from what, at what cost, and when not to distil."""

from capgap.plan.apart import Apart, Law, apart
from capgap.plan.estimate import Estimate, estimate, narrowed
from capgap.plan.families import Family, Member, family_names, load_family
from capgap.plan.plan import Ask, Candidate, Plan, make_plan, resolve
from capgap.plan.second import Predicted, SecondAsk
from capgap.plan.verdicts import Verdict

__all__ = [
    "Apart",
    "Ask",
    "Candidate",
    "Estimate",
    "Family",
    "Law",
    "Member",
    "Plan",
    "Predicted",
    "SecondAsk",
    "Verdict",
    "apart",
    "estimate",
    "family_names",
    "load_family",
    "make_plan",
    "narrowed",
    "resolve",
]
