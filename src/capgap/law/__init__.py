"""The law of capacity gap: published, and fitted to a study's losses."""

from capgap.law.busbridge import PUBLISHED_SECOND, Alone, SecondFit, SecondLaw, Taught, fit_second_law
from capgap.law.fit import fit_law, law_from_dict
from capgap.law.lawfit import Beside, Estimate, LawFit, Observation, Prediction, StudentOptimum
from capgap.law.line import LineFit, fit_optima
from capgap.law.optimum import Optimum, find_optimum
from capgap.law.published import PUBLISHED, PublishedLaw, PublishedPick, published_teacher, scale_text
from capgap.law.tables import LossTable, OptimaTable, read_table

__all__ = [
    "PUBLISHED",
    "PUBLISHED_SECOND",
    "Alone",
    "Beside",
    "Estimate",
    "LawFit",
    "LineFit",
    "LossTable",
    "Observation",
    "OptimaTable",
    "Optimum",
    "Prediction",
    "PublishedLaw",
    "PublishedPick",
    "SecondFit",
    "SecondLaw",
    "StudentOptimum",
    "Taught",
    "find_optimum",
    "fit_law",
    "fit_optima",
    "fit_second_law",
    "law_from_dict",
    "published_teacher",
    "read_table",
    "scale_text",
]
