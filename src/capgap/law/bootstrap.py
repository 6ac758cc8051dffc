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
    """Pools the noise over students: seeds' over all, that about the parabolas over those whose optimum is inside.

    What a censored student's losses have that is no parabola tells nothing of where the others' optima lie; only where
    no optimum is inside, or none of them has more than three teachers, all students' scatter is taken.

    Seed means scatter about a parabola for two reasons, seeds and a shape that is not quite a parabola. Seeds
    are drawn separately, so their part is taken out of the scatter (two-level bootstrap, Davison and Hinkley
    1997, section 3.8): the variance used is the larger of what the parabolas and what the seeds say.
    """
    telling = [(at, optimum) for at, optimum in zip(points, optima, strict=True) if len(at.teachers) > 3]
    telling = [(at, optimum) for at, optimum in telling if optimum.censored is None] or telling
    scaled = []
    for at, optimum in telling:
        n = len(at.teachers)
        scaled.append((at.means - optimum.curve(at.teachers)) * np.sqrt(n / (n - 3)))
    scatter = np.concatenate(scaled) if scaled else np.empty(0)
    scatter = scatter - scatter.mean() if len(scatter) else scatter
    seeds = np.concatenate([at.deviations for at in points])
    if len(scatter) and len(seeds):
        explained = (seeds**2).mean() * np.concatenate([1 / at.counts for at, _ in telling]).mean()
        total = (scatter**2).mean()
        scatter = scatter * np.sqrt(max(0.0, 1 - explained / total)) if total > 0 else scatter
    degrees = sum(len(at.teachers) - 3 for at, _ in telling)
    degrees += sum(int(at.counts.sum()) - len(at.teachers) for at in points)
    return Noise(scatter, seeds, degrees)


def optimum_errors(points: Sequence[StudentPoints], optima: Sequence[Optimum], noise: Noise) -> Floats:
    """Standard deviations of each student's ln T* by the delta method, [N].

    The vertex is at x = -c1 / (2 c2), and its gradient in the coefficients is -(0, 1, 2 x) / (2 c2). For c2 stands the
    students' median: it is the least sure of all, and an optimum that errs by a low one must not seem the surest or the
    least sure for it. A censored optimum gets the median of the others.
    """
    errors = np.full(len(points), np.nan)
    spread = float((noise.scatter**2).mean()) if len(noise.scatter) else 0.0
    seeds = float((noise.seeds**2).mean()) if len(noise.seeds) else 0.0
    bends = [optimum.curvature / 2 for optimum in optima if optimum.censored is None]
    bend = float(np.median(bends)) if bends else np.nan
    for n, (at, optimum) in enumerate(zip(points, optima, strict=True)):
        if optimum.censored is None:
            solve = _solve(at, optimum)
            vertex = np.log(optimum.teacher / optimum.reference)
            gradient = -np.array([0.0, 1.0, 2 * vertex]) / (2 * bend) @ solve
            errors[n] = np.sqrt((gradient**2) @ (spread + seeds / at.counts))
    return np.where(np.isnan(errors), np.nanmedian(errors), errors)


@dataclass(frozen=True)
class Draws:
    """Optima of R replicates for each of N students.

    Attributes:
        logs: ln T*, or where censored ln of the grid's edge, [R, N].
        sides: 0 inside the grid, -1 censored at its low edge, 1 at its high edge, [R, N].
    """

    logs: Floats
    sides: Floats


def resample_optima(
    points: Sequence[StudentPoints],
    optima: Sequence[Optimum],
    noise: Noise,
    replicates: int,
    rng: np.random.Generator,
) -> Draws:
    """Draws new losses around each parabola, fits it anew, and finds its optimum by the rule of `find_optimum`."""
    logs_RN, sides_RN = np.empty((replicates, len(points))), np.zeros((replicates, len(points)))
    for n, (at, optimum) in enumerate(zip(points, optima, strict=True)):
        x_C = np.log(at.teachers / optimum.reference)
        # Drawing noise alone and adding the parabola afterwards keeps digits.
        noise_RC = _draw(at, noise, replicates, rng)
        coefficients_R3 = noise_RC @ _solve(at, optimum).T + np.array(optimum.coefficients)
        c1, c2 = coefficients_R3[:, 1], coefficients_R3[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = -c1 / (2 * c2)
        means_RC = noise_RC + optimum.curve(at.teachers)
        lowest = means_RC.argmin(axis=1)
        within = (lowest > 0) & (lowest < len(x_C) - 1)
        inside = (c2 > 0) & (vertex >= x_C[0]) & (vertex <= x_C[-1]) & within
        side = np.where(means_RC[:, 0] <= means_RC[:, -1], -1, 1)
        sides_RN[:, n] = np.where(inside, 0, side)
        bound = np.where(side < 0, np.where(within, lowest + 1, 0), np.where(within, lowest - 1, len(x_C) - 1))
        edge = np.log(at.teachers)[bound]
        logs_RN[:, n] = np.where(inside, np.log(optimum.reference) + vertex, edge)
    return Draws(logs_RN, sides_RN)


def _solve(at: StudentPoints, optimum: Optimum) -> Floats:
    """The matrix [3, C] that gives a parabola's coefficients from the seed means."""
    design = parabola(np.log(at.teachers / optimum.reference))
    weighted = design.T * at.counts
    return np.linalg.solve(weighted @ design, weighted).astype(np.float64)


def _draw(at: StudentPoints, noise: Noise, replicates: int, rng: np.random.Generator) -> Floats:
    """Noise of the seed means, [R, C], nats per token."""
    drawn_RC = np.zeros((replicates, len(at.teachers)))
    if len(noise.scatter):
        drawn_RC += rng.choice(noise.scatter, size=drawn_RC.shape)
    if len(noise.seeds):
        for c, count in enumerate(at.counts.astype(int)):
            drawn_RC[:, c] += rng.choice(noise.seeds, size=(replicates, count)).mean(axis=1)
    return drawn_RC
