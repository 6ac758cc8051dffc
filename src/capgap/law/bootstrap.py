"""Resampling the whole chain: losses -> optimal teachers -> law.

Two students give a line without a residual, so an interval cannot come from the line. It comes from how far
the losses scatter about each student's parabola, and how far seeds scatter about each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capgap.law.optimum import Floats, Optimum, parabola


@dataclass(frozen=True)
class StudentPoints:
    """One student's losses gathered by teacher (C distinct teachers).

    Attributes:
        student: parameters.
        teachers: parameters, [C], ascending.
        means: mean loss over seeds, nats per token, [C].
        counts: number of seeds, [C].
        deviations: seed losses less their teacher's mean, times sqrt(m / (m - 1)) for m > 1 seeds, all
            teachers in one array (empty where no teacher has several seeds).
    """

    student: float
    teachers: Floats
    means: Floats
    counts: Floats
    deviations: Floats


def gather(student: float, teachers_P: Floats, losses_P: Floats) -> StudentPoints:
    """Gathers a student's P points by teacher."""
    teachers = np.unique(teachers_P)
    groups = [losses_P[teachers_P == t] for t in teachers]
    deviations = [(g - g.mean()) * np.sqrt(len(g) / (len(g) - 1)) for g in groups if len(g) > 1]
    return StudentPoints(
        student=student,
        teachers=teachers,
        means=np.array([g.mean() for g in groups]),
        counts=np.array([float(len(g)) for g in groups]),
        deviations=np.concatenate(deviations) if deviations else np.empty(0),
    )


@dataclass(frozen=True)
class Noise:
    """What the losses scatter by, nats per token.

    Attributes:
        scatter: seed means about the parabolas, pooled over students, centred, each student's scaled by
            sqrt(n / (n - 3)) for its n teachers, and shrunk by the part that the seeds explain.
        seeds: seeds about their mean, pooled over students; empty where every teacher has one seed.
        degrees: degrees of freedom behind both.
    """

    scatter: Floats
    seeds: Floats
    degrees: int


def noise_of(points: Sequence[StudentPoints], optima: Sequence[Optimum]) -> Noise:
    """Pools the noise over students, censored ones too: their parabolas measure it as well.

    Seed means scatter about a parabola for two reasons, seeds and a shape that is not quite a parabola. Seeds
    are drawn separately, so their part is taken out of the scatter (two-level bootstrap, Davison and Hinkley
    1997, section 3.8): the variance used is the larger of what the parabolas and what the seeds say.
    """
    scaled = []
    for at, optimum in zip(points, optima, strict=True):
        n = len(at.teachers)
        if n > 3:
            scaled.append((at.means - optimum.curve(at.teachers)) * np.sqrt(n / (n - 3)))
    scatter = np.concatenate(scaled) if scaled else np.empty(0)
    scatter = scatter - scatter.mean() if len(scatter) else scatter
    seeds = np.concatenate([at.deviations for at in points])
    if len(scatter) and len(seeds):
        explained = (seeds**2).mean() * np.concatenate([1 / at.counts for at in points]).mean()
        total = (scatter**2).mean()
        scatter = scatter * np.sqrt(max(0.0, 1 - explained / total)) if total > 0 else scatter
    degrees = sum(len(at.teachers) - 3 + int(at.counts.sum()) - len(at.teachers) for at in points)
    return Noise(scatter, seeds, degrees)


def resample_optima(
    points: Sequence[StudentPoints],
    optima: Sequence[Optimum],
    noise: Noise,
    replicates: int,
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Optimal teachers of R replicates for each of N students.

    A replicate draws new losses around each parabola and fits it anew. A vertex that leaves the grid is put
    at the edge it left by; a parabola that opens downwards gives the edge where it is lower.

    Returns: optima [R, N] in parameters, and for each student the share of replicates put at an edge [N].
    """
    optima_RN = np.empty((replicates, len(points)))
    clamped_N = np.empty(len(points))
    for n, (at, optimum) in enumerate(zip(points, optima, strict=True)):
        x_C = np.log(at.teachers / optimum.reference)
        design = parabola(x_C)
        weighted = design.T * at.counts
        solve = np.linalg.solve(weighted @ design, weighted)
        # Drawing noise alone and adding the parabola afterwards keeps digits.
        coefficients_R3 = _draw(at, noise, replicates, rng) @ solve.T + np.array(optimum.coefficients)
        c1, c2 = coefficients_R3[:, 1], coefficients_R3[:, 2]
        low, high = x_C[0], x_C[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = -c1 / (2 * c2)
        lower_edge = np.where(c1 * low + c2 * low**2 <= c1 * high + c2 * high**2, low, high)
        x_R = np.where(c2 > 0, np.clip(vertex, low, high), lower_edge)
        clamped_N[n] = float(np.mean((c2 <= 0) | (vertex < low) | (vertex > high)))
        optima_RN[:, n] = optimum.reference * np.exp(x_R)
    return optima_RN, clamped_N


def _draw(at: StudentPoints, noise: Noise, replicates: int, rng: np.random.Generator) -> Floats:
    """Noise of the seed means, [R, C], nats per token."""
    drawn_RC = np.zeros((replicates, len(at.teachers)))
    if len(noise.scatter):
        drawn_RC += rng.choice(noise.scatter, size=drawn_RC.shape)
    if len(noise.seeds):
        for c, count in enumerate(at.counts.astype(int)):
            drawn_RC[:, c] += rng.choice(noise.seeds, size=(replicates, count)).mean(axis=1)
    return drawn_RC


@dataclass(frozen=True)
class LawNumbers:
    """The law's numbers for each of R sets of optima, every array [R]; NaN where they are not defined."""

    slope: Floats
    intercept: Floats
    r_squared: Floats
    ratio: Floats
    exponent: Floats


def law_numbers(students_N: Floats, optima_RN: Floats) -> LawNumbers:
    """Least-squares line, its R^2, geometric-mean ratio and log-log slope of R sets of N optima.

    The ratio is exp(mean ln(T / S)): parabolas in ln T err by factors, not by differences, and the largest
    student should not decide alone.
    """
    replicates, n = optima_RN.shape
    undefined = np.full(replicates, np.nan)
    logs_RN = np.log(optima_RN)
    ratio = np.exp((logs_RN - np.log(students_N)).mean(axis=1))
    if n < 2:
        return LawNumbers(undefined, undefined, undefined, ratio, undefined)
    centred = students_N - students_N.mean()
    slope = optima_RN @ centred / (centred @ centred)
    intercept = optima_RN.mean(axis=1) - slope * students_N.mean()
    log_centred = np.log(students_N) - np.log(students_N).mean()
    exponent = logs_RN @ log_centred / (log_centred @ log_centred)
    r_squared = undefined
    if n > 2:
        residual = ((optima_RN - slope[:, None] * students_N - intercept[:, None]) ** 2).sum(axis=1)
        total = ((optima_RN - optima_RN.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        r_squared = 1 - np.divide(residual, total, out=undefined.copy(), where=total > 0)
    return LawNumbers(slope, intercept, r_squared, ratio, exponent)
