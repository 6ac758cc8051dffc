"""Laws beside each other: how well each foretells a student scale that it was not fitted to, and what rests on what."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from capgap.errors import LawError
from capgap.law.censored import FORMS, Form
from capgap.law.chain import Chain, Fitted, Optima
from capgap.law.lawfit import Estimate, Prediction, StudentOptimum
from capgap.law.optimum import Floats
from capgap.law.published import check_scale, scale_text

PUBLISHED_RATIO = 2.5
_ROUNDED = 0.05
"""By how much ln of the tokens per parameter may differ within one budget, as runs are of whole steps."""


@dataclass(frozen=True)
class BudgetOptimum:
    """One student's optimum at one budget.

    Attributes:
        optimum: of a LawFit.
        per_parameter: tokens for each of the student's parameters.
        group: what sets it apart from others of the same scale and budget, such as a family or an objective.
    """

    optimum: StudentOptimum
    per_parameter: float = 1.0
    group: str = ""


@dataclass(frozen=True)
class LawScore:
    """How well a law foretells the optimum of a student scale that it was not fitted to.

    Attributes:
        law: such as "line, with tokens".
        parameters: fitted.
        error: root mean square of measured less foretold ln T*; of a bound that holds it is 0, of a broken one how far
            beyond it the foretold teacher lies. Infinite where too few other scales are left to fit the law to.
        optima: how many optima were inside their grids.
        broken: bounds that the foretold teacher lies on the wrong side of, and how many there were.
    """

    law: str
    parameters: int
    error: float
    optima: int
    broken: tuple[int, int]

    @property
    def factor(self) -> float:
        """The error as a factor of T*."""
        return float(np.exp(self.error))


def compare_laws(measured: Sequence[BudgetOptimum]) -> list[LawScore]:
    """Each law's error over student scales, each left out with all its budgets in turn; the best first.

    The laws are T* = 2.5 S, with nothing fitted; a ratio r S; a line a S + b; a power c S^k; and where there are
    several budgets each of these three times a power of the tokens per parameter.

    Raises: LawError below three student scales with an optimum inside its grid.
    """
    optima, logs = _arrays(measured)
    scales = np.unique(optima.students)
    if len(np.unique(optima.students[optima.sides == 0])) < 3:
        raise LawError(
            "laws are compared by leaving out a student scale; three with an optimum in their grid are needed"
        )
    several = _told_apart(optima, logs)
    scores = [_score("2.5 S", 0, optima, np.log(PUBLISHED_RATIO * optima.students))]
    for form in FORMS:
        for tokens in (False, True)[: 1 + several]:
            foretold = np.empty(len(optima.students))
            size = 0
            for scale in scales:
                out = optima.students == scale
                if np.unique(optima.students[~out & (optima.sides == 0)]).size < (1 if form == "ratio" else 2):
                    foretold[out] = np.nan
                    continue
                fitted = _fit(form, optima.only(~out), logs[~out] if tokens else None)
                foretold[out] = _foretell(fitted, optima.students[out], logs[out] if tokens else None)
                size = fitted.curve.size
            scores.append(_score(form + ", with tokens" * tokens, size, optima, foretold))
    return sorted(scores, key=lambda score: score.error)


@dataclass(frozen=True)
class Influence:
    """The law without one student scale: parameters; slope, intercept and exponent as they are then."""

    without: float
    slope: float
    intercept: float
    exponent: float


def influence(rows: Sequence[StudentOptimum]) -> list[Influence]:
    """What the line and the exponent become without each student; [] below three optima inside their grids."""
    found = []
    for row in rows:
        rest = [other for other in rows if other is not row]
        if row.side or sum(other.side == 0 for other in rest) < 2:
            continue
        optima = Optima.of(rest)
        slope, intercept = _fit("line", optima, None).line()
        exponent = _fit("power", optima, None).theta_RK[0, 1]
        found.append(Influence(row.student, float(slope[0]), float(intercept[0]), float(exponent)))
    return found


@dataclass(frozen=True)
class TokenLaw:
    """T* / S = r (S / S0)^(k - 1) (D/S / d0)^g.

    Attributes:
        ratio: r at the middle student and budget; exponent: k of S at equal tokens per parameter; tokens: g.
        student: S0, parameters; per_parameter: d0, tokens for each of the student's parameters; geometric middles.
        p_linear, p_tokens: two-sided p values of k = 1 and g = 0; None without intervals.
        optima: how many it rests on, inside their grids and censored.
        students, budgets: the smallest and largest student (parameters) and tokens per parameter that were measured.
    """

    ratio: Estimate
    exponent: Estimate
    tokens: Estimate
    student: float
    per_parameter: float
    p_linear: float | None
    p_tokens: float | None
    optima: tuple[int, int]
    students: tuple[float, float]
    budgets: tuple[float, float]
    draws: Floats = field(repr=False, compare=False)

    def at(self, tokens: float) -> "AtTokens":
        """The law at so many tokens."""
        return AtTokens(self, check_scale(tokens, "the tokens"))

    def predict(self, student: float, tokens: float) -> Prediction:
        """The optimal teacher of a student at so many tokens, with the 95 % interval of a new optimum.

        No teacher is taken below the student's own scale. `note` says what was extrapolated.

        Raises: LawError if a number is not positive and finite.
        """
        student, tokens = check_scale(student, "the student's scale"), check_scale(tokens, "the tokens")
        x, budget = np.log(student / self.student), tokens / student
        d = np.log(budget / self.per_parameter)
        value = float(self.ratio.value * student * np.exp((self.exponent.value - 1) * x + self.tokens.value * d))
        notes = [f"at {budget:.3g} tokens per parameter"]
        if not self.students[0] <= student <= self.students[1]:
            notes.append(f"extrapolated: students of {' to '.join(map(scale_text, self.students))} were measured")
        if not self.budgets[0] <= budget <= self.budgets[1]:
            low, high = self.budgets
            notes.append(f"extrapolated: {low:.3g} to {high:.3g} tokens per parameter were measured")
        if value < student:
            notes.append("the law names no teacher larger than the student: the next larger model is the best")
        low = high = None
        if len(self.draws):
            constant, exponent, power, deviation = self.draws.T
            drawn = np.exp(constant + (exponent - 1) * x + power * d + deviation) * student
            low, high = (max(float(edge), student) for edge in np.quantile(drawn, [0.025, 0.975]))
        teacher = max(value, student)
        return Prediction(teacher, low, high, teacher / student, "with tokens", "; ".join(notes))


@dataclass(frozen=True)
class AtTokens:
    """A law with tokens, at so many of them."""

    law: TokenLaw
    tokens: float

    def predict(self, student: float) -> Prediction:
        """The optimal teacher of a student of `student` parameters."""
        return self.law.predict(student, self.tokens)


def fit_tokens(measured: Sequence[BudgetOptimum], *, replicates: int = 2000, seed: int = 0) -> TokenLaw:
    """The law in which tokens per parameter stand beside the student's scale, through the optima of several budgets.

    Errors of one student's optima at several budgets are taken to be independent. They are not quite: a longer run goes
    on from a shorter one.

    Raises: LawError if the optima inside their grids are of one student scale or one budget, or too few to fit three
        numbers.
    """
    optima, logs = _arrays(measured)
    inside = optima.sides == 0
    budgets = {m.group or round(log, 2) for m, log, is_inside in zip(measured, logs, inside, strict=True) if is_inside}
    if inside.sum() < 3 or len(np.unique(optima.students[inside])) < 2 or len(budgets) < 2:
        raise LawError(
            f"{int(inside.sum())} optima inside their grids; a law with tokens needs three, of two student scales and "
            "two budgets at least"
        )
    student, middle = np.exp(np.log(optima.students[inside]).mean()), np.exp(logs[inside].mean())
    columns = np.stack([np.log(optima.students / student), logs - np.log(middle)], axis=1)
    if not _told_apart(optima, logs):
        raise LawError(
            "tokens per parameter and students move together, so that their effects cannot be told apart; run a "
            "student at two budgets"
        )
    chain = Chain(optima, None, replicates, np.random.default_rng(seed), 0.95)
    # A ratio with a power of S as a further column is a power law.
    fitted = chain.fit("ratio", columns)
    draws = np.empty((0, 4))
    if fitted.drawn is not None:
        constant, exponent, power = fitted.drawn.theta_RK.T
        draws = np.stack([constant, 1 + exponent, power, fitted.deviations], axis=1)
    return TokenLaw(
        ratio=fitted.estimate(lambda f: np.exp(f.theta_RK[:, 0])),
        exponent=fitted.estimate(lambda f: 1 + f.theta_RK[:, 1]),
        tokens=fitted.estimate(lambda f: f.theta_RK[:, 2]),
        student=float(student),
        per_parameter=float(middle),
        p_linear=fitted.p_value(0.0, 1),
        p_tokens=fitted.p_value(0.0, 2),
        optima=(int(inside.sum()), int((~inside).sum())),
        students=(float(optima.students.min()), float(optima.students.max())),
        budgets=(float(np.exp(logs.min())), float(np.exp(logs.max()))),
        draws=draws,
    )


def _arrays(measured: Sequence[BudgetOptimum]) -> tuple[Optima, Floats]:
    return Optima.of([m.optimum for m in measured]), np.log([m.per_parameter for m in measured])


def _told_apart(optima: Optima, logs: Floats) -> bool:
    """Whether tokens per parameter vary by more than steps are rounded, and not just as the students' scales do."""
    design = np.stack([np.ones(len(logs)), np.log(optima.students)], axis=1)
    left = logs - design @ np.linalg.lstsq(design, logs, rcond=None)[0]
    return float(np.abs(left).max()) > _ROUNDED


def _fit(form: Form, optima: Optima, logs: Floats | None) -> Fitted:
    more = None if logs is None else logs[:, None]
    return Chain(optima, None, 0, np.random.default_rng(0), 0.95).fit(form, more).found


def _foretell(fitted: Fitted, students: Floats, logs: Floats | None) -> Floats:
    """ln T* of other students, beyond those it was fitted to also; ln S where a line names no positive scale."""
    theta = fitted.theta_RK
    if fitted.curve.form == "line":
        slope, intercept = fitted.line()
        named = slope[0] * students + intercept[0]
        mean = np.log(np.where(named > 0, named, students))
    elif fitted.curve.form == "power":
        mean = theta[0, 0] + theta[0, 1] * np.log(students / fitted.curve.students[0])
    else:
        mean = theta[0, 0] + np.log(students)
    return mean if logs is None else mean + theta[0, -1] * logs


def _score(law: str, parameters: int, optima: Optima, foretold: Floats) -> LawScore:
    inside, beyond = optima.sides == 0, optima.sides != 0
    off = optima.logs - foretold
    broken = beyond & (off * optima.sides > 0)
    error = float(np.sqrt(np.mean(np.where(inside | broken, off, 0.0) ** 2)))
    error = error if np.isfinite(foretold).all() else np.inf
    return LawScore(law, parameters, error, int(inside.sum()), (int(broken.sum()), int(beyond.sum())))
