"""The laws that a study's records hold for a plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from capgap.law import AtTokens, LawFit, RoleLaw, TokenLaw
from capgap.records import RunRecord
from capgap.report.analysis import Analysis, analyse
from capgap.report.report import law_of


@dataclass(frozen=True)
class OwnLaws:
    """What a plan takes from a study.

    Attributes:
        law: with tokens beside the student's scale where the optima tell how they matter, else that of one budget.
        roles: at the budget nearest to the plan's, or with most runs; None where roles were not varied apart.
        told: which law it is, in words; why it is not the one with tokens.
    """

    law: LawFit | AtTokens
    roles: RoleLaw | None
    told: str


MOST_UNSURE = 30.0
"""By which factor the ends of a law's interval for a student may differ, and the law still decide for it."""


def own_laws_of(records: Sequence[RunRecord], student: int, tokens: int | None) -> OwnLaws:
    """The laws for a student of `student` parameters on `tokens` tokens; None leaves the budget open.

    Raises: LawError if no law can be fitted.
    """
    analysis = analyse(records)
    roles = _roles(analysis, None if tokens is None else tokens / student)
    unsure = ""
    if tokens is not None and analysis.tokens is not None:
        inside, censored = analysis.tokens.optima
        name = f"the law with tokens, through {inside} optima and {censored} bounds of {len(analysis.budgets)} budgets"
        if not (unsure := _unsure(analysis.tokens, student, tokens)):
            return OwnLaws(analysis.tokens.at(tokens), roles, name)
        unsure = f"; {name}, is not used: {unsure}"
    chosen = analysis.main if tokens is None else analysis.nearest(tokens / student)
    if chosen is None or chosen.law is None:
        return OwnLaws(law_of(records), roles, "the law of its runs")  # which says why there is none
    told = f"the law of its runs at {chosen.name}"
    if tokens is not None:
        told += f"; yours has {tokens / student:.2g} for each of the student's parameters"
    return OwnLaws(chosen.law, roles, told + unsure)


def _unsure(law: TokenLaw, student: int, tokens: int) -> str:
    """Why a law with tokens says too little of a student to decide; nothing where it does not."""
    at = law.predict(student, tokens)
    if at.low is None or at.high is None:
        return ""
    factor = at.high / at.low
    if math.isfinite(factor) and factor <= MOST_UNSURE:
        return ""
    return f"for this student its interval is a factor of {factor:.2g} wide, so that it tells nothing"


def _roles(analysis: Analysis, per_parameter: float | None) -> RoleLaw | None:
    if not analysis.roles:
        return None
    ratios = {budget.name: budget.per_parameter for budget in analysis.budgets}
    known = [roles for roles in analysis.roles if roles.name in ratios]
    if per_parameter is None or not known:
        return max(analysis.roles, key=lambda roles: sum(surface.runs for surface in roles.surfaces)).law
    return min(known, key=lambda roles: abs(math.log(ratios[roles.name] / per_parameter))).law
