"""The second law: distillation scaling laws, in which the teacher enters through its own loss and tokens count.

It is of students that start from random weights, not of students cut from a model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TypeVar

import numpy as np
from scipy.optimize import least_squares

from capgap.errors import LawError
from capgap.law.optimum import Floats
from capgap.law.published import check_scale

SOURCE = "Busbridge et al.: Distillation Scaling Laws, arXiv:2502.08606"


@dataclass(frozen=True)
class Supervised:
    """Loss of a model trained without a teacher: E + (A / N^alpha + B / D^beta)^gamma, nats per token.

    N counts parameters without embeddings, D tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    def loss(self, parameters: Floats | float, tokens: Floats | float) -> Floats:
        """Nats per token, of the arguments' common shape."""
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        return self.E + (self.A / n**self.alpha + self.B / d**self.beta) ** self.gamma


@dataclass(frozen=True)
class Distillation:
    """Loss of a student under a teacher of loss L_T, nats per token:

    L_T + L_T^-c0 (1 + (L_T / (L d1))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma

    where L is the loss that the same student reaches without a teacher.
    """

    A: float
    B: float
    alpha: float
    beta: float
    gamma: float
    c0: float
    c1: float
    f1: float
    d1: float

    def loss(self, teacher_loss: Floats | float, alone: Floats | float, n: Floats | float, d: Floats | float) -> Floats:
        """Nats per token, of the arguments' common shape.

        Args:
            teacher_loss: L_T; alone: the student's own loss without a teacher.
            n: the student's parameters without embeddings; d: its tokens.
        """
        teacher, own = np.asarray(teacher_loss, np.float64), np.asarray(alone, np.float64)
        n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
        # log(1 + r^(1/f)) of a large r^(1/f) overflows when taken in two steps.
        bend = np.logaddexp(0.0, np.log(teacher / (own * self.d1)) / self.f1)
        room = (self.A / n**self.alpha + self.B / d**self.beta) ** self.gamma
        return teacher + np.exp(-self.c0 * np.log(teacher) - self.c1 * self.f1 * bend) * room


@dataclass(frozen=True)
class Measured:
    """What a second law was fitted to; beyond it, the law is extrapolated.

    Attributes:
        students: their fewest and most parameters.
        teachers: the most parameters of a model trained without a teacher, as teachers are: theirs give their losses.
        tokens: the fewest and the most that a model was trained on; the fewest is 0 where it is not known.
        embeddings: whether N counts embeddings too.
    """

    students: tuple[float, float]
    teachers: float
    tokens: tuple[float, float]
    embeddings: bool = False


@dataclass(frozen=True)
class SecondLaw:
    """Both parts, where they come from, and what they were fitted to."""

    supervised: Supervised
    distillation: Distillation
    source: str
    fitted: Measured

    def student_loss(self, teacher_loss: Floats | float, n: Floats | float, d: Floats | float) -> Floats:
        """Of a student of `n` parameters without embeddings, distilled on `d` tokens, nats per token."""
        return self.distillation.loss(teacher_loss, self.supervised.loss(n, d), n, d)

    def best_teacher(self, teacher_losses: Sequence[float], n: float, d: float) -> int:
        """The place of the teacher under which the student's loss is lowest.

        Raises: LawError if there is none, or a number is not positive and finite.
        """
        n, d = check_scale(n, "the student's parameters"), check_scale(d, "the tokens")
        losses = np.asarray(teacher_losses, np.float64)
        if not losses.size or not np.isfinite(losses).all() or (losses <= 0).any():
            raise LawError(f"the teachers' losses {list(teacher_losses)} must be positive, finite nats per token")
        return int(np.argmin(self.student_loss(losses, n, d)))

    def best_loss(self, n: float, d: float) -> float:
        """The teacher's loss, nats per token, under which the student's is lowest, between E and the student's own."""
        own = float(self.supervised.loss(n, d))
        tried = np.geomspace(0.5 * own, 1.2 * own, 4001)
        return float(tried[np.argmin(self.student_loss(tried, n, d))])


PUBLISHED_SECOND = SecondLaw(
    Supervised(E=1.220, A=3355.0, B=18186.0, alpha=0.408, beta=0.431, gamma=0.452),
    Distillation(A=2243.0, B=24181.0, alpha=0.321, beta=0.637, gamma=0.764, c0=2.549, c1=522.61, f1=0.090, d1=1.315),
    f"{SOURCE}; English C4 with a tokenizer of its own",
    Measured(students=(143e6, 7.75e9), teachers=12.6e9, tokens=(0, 512e9)),
)
"""As published."""

ALONE_NEEDED, TAUGHT_NEEDED = 6, 9
"""Runs that a refit needs, without a teacher and under one: as many as there are coefficients."""


@dataclass(frozen=True)
class Alone:
    """A run without a teacher: parameters (`Measured.embeddings`), tokens, held-out nats per token."""

    n: float
    d: float
    loss: float


@dataclass(frozen=True)
class Taught:
    """A run from random weights under a teacher, whose own loss was `teacher_loss`."""

    n: float
    d: float
    loss: float
    teacher_loss: float


@dataclass(frozen=True)
class SecondFit:
    """A refit of the second law.

    Attributes:
        error: root mean square of measured less fitted loss, nats per token: of the runs without a teacher and under
            one.
        runs: how many of each.
    """

    law: SecondLaw
    error: tuple[float, float]
    runs: tuple[int, int]


def fit_second_law(alone: Sequence[Alone], taught: Sequence[Taught], *, embeddings: bool = False) -> SecondFit:
    """Fits both parts to a study's runs, robustly (a soft L1 loss of the differences of logarithms).

    Coefficients that runs tell little about stay near the published ones: each is drawn to its published value as by
    one run with an error of a factor e for the sizes A and B, and of a half of itself for the others.

    Args:
        embeddings: whether the runs' parameters count embeddings; those that the law is asked about must then, too.
    Raises: LawError with fewer runs than coefficients (6 and 9).
    """
    for what, runs, needed in (("without a teacher", alone, ALONE_NEEDED), ("under a teacher", taught, TAUGHT_NEEDED)):
        if len(runs) < needed:
            raise LawError(f"{len(runs)} runs {what} from random weights; this law needs at least {needed}")
    n, d, loss = (np.array([getattr(run, key) for run in alone]) for key in ("n", "d", "loss"))
    floor = float(min(loss.min(), *(run.teacher_loss for run in taught)))
    first = _fit(
        PUBLISHED_SECOND.supervised,
        lambda part: np.log(part.loss(n, d) / loss),
        # What cannot be reduced lies below everything measured.
        {"E": floor},
    )
    tn, td, tl, tt = (np.array([getattr(run, key) for run in taught]) for key in ("n", "d", "loss", "teacher_loss"))
    own = first.loss(tn, td)
    second = _fit(PUBLISHED_SECOND.distillation, lambda part: np.log(part.loss(tt, own, tn, td) / tl), {})
    sizes, tokens = [float(x) for x in (*n, *tn)], [float(x) for x in (*d, *td)]
    fitted = Measured((min(sizes), max(sizes)), float(n.max()), (min(tokens), max(tokens)), embeddings)
    source = f"refit to {len(alone)} runs without a teacher and {len(taught)} under one; form: {SOURCE}"
    law = SecondLaw(first, second, source, fitted)
    errors = _rms(first.loss(n, d) - loss), _rms(law.student_loss(tt, tn, td) - tl)
    return SecondFit(law, errors, (len(alone), len(taught)))


_NOISE = 0.01
"""Scatter of a run's log loss that weighs runs against the pull to the published coefficients."""


P = TypeVar("P", Supervised, Distillation)


def _fit(published: P, errors: Callable[[P], Floats], below: dict[str, float]) -> P:
    names = [f.name for f in fields(published)]
    start = np.log(np.array(astuple(published)))
    width = np.array([1.0 if name in ("A", "B") else 0.5 for name in names])
    top = np.array([math.log(below.get(name, math.inf)) for name in names])
    begin = np.minimum(start, top - 1e-3)

    def residuals(logs: Floats) -> Floats:
        part = type(published)(*np.exp(logs).tolist())
        return np.concatenate([errors(part) / _NOISE, (logs - start) / width])

    with np.errstate(over="ignore"):  # coefficients that are tried on the way may be of any size
        bounds = np.full(len(names), -np.inf), top
        found = least_squares(residuals, begin, bounds=bounds, loss="soft_l1", max_nfev=4000)
    return type(published)(*np.exp(found.x).tolist())


def _rms(errors: Floats) -> float:
    return float(np.sqrt(np.mean(errors**2)))
