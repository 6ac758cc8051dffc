"""The law of capacity gap: published, and fitted to a study's losses."""

from capgap.law.busbridge import (
    ALONE_NEEDED,
    PUBLISHED_SECOND,
    TAUGHT_NEEDED,
    Alone,
    Measured,
    SecondFit,
    SecondLaw,
    Taught,
    fit_second_law,
)
from capgap.law.compare import (
    AtTokens,
    BudgetOptimum,
    Influence,
    LawScore,
    TokenLaw,
    compare_laws,
    fit_tokens,
    influence,
)
from capgap.law.fit import fit_law, law_from_dict
from capgap.law.hypotheses import Test, constant_ratio, interior_optimum, teacher_matters
from capgap.law.lawfit import Beside, Estimate, LawFit, Observation, Prediction, StudentOptimum
from capgap.law.line import LineFit, fit_optima
from capgap.law.optimum import Optimum, find_optimum
from capgap.law.published import PUBLISHED, PublishedLaw, PublishedPick, published_teacher, scale_text
from capgap.law.roles import RoleLaw, RoleObservation, RoleOptimum, RoleSurface, find_roles, fit_roles
from capgap.law.tables import LossRow, LossTable, OptimaTable, read_table

__all__ = [
    "ALONE_NEEDED",
    "PUBLISHED",
    "PUBLISHED_SECOND",
    "TAUGHT_NEEDED",
    "Alone",
    "AtTokens",
    "Beside",
    "BudgetOptimum",
    "Estimate",
    "Influence",
    "LawFit",
    "LawScore",
    "LineFit",
    "LossRow",
    "LossTable",
    "Measured",
    "Observation",
    "OptimaTable",
    "Optimum",
    "Prediction",
    "PublishedLaw",
    "PublishedPick",
    "RoleLaw",
    "RoleObservation",
    "RoleOptimum",
    "RoleSurface",
    "SecondFit",
    "SecondLaw",
    "StudentOptimum",
    "Taught",
    "Test",
    "TokenLaw",
    "compare_laws",
    "constant_ratio",
    "find_optimum",
    "find_roles",
    "fit_law",
    "fit_optima",
    "fit_roles",
    "fit_second_law",
    "fit_tokens",
    "influence",
    "interior_optimum",
    "law_from_dict",
    "published_teacher",
    "read_table",
    "scale_text",
    "teacher_matters",
]
