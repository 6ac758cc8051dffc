"""The law derived again, in plain Python: shares no code with capgap.law."""

import math
from fractions import Fraction


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination in exact rationals."""
    rows = [[Fraction(v) for v in row] + [Fraction(r)] for row, r in zip(matrix, right, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i] != 0)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for r in range(n):
            if r != i:
                factor = rows[r][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [float(row[n]) for row in rows]


def parabola_minimum(teachers: list[float], losses: list[float]) -> tuple[float, float, float]:
    """Least-squares parabola in ln T: its curvature, the teacher at its vertex, the loss there."""
    x = [math.log(t) for t in teachers]
    moments = [sum(Fraction(v) ** p for v in x) for p in range(5)]
    right = [sum(Fraction(v) ** p * Fraction(y) for v, y in zip(x, losses, strict=True)) for p in range(3)]
    c0, c1, c2 = solve([[moments[i + j] for j in range(3)] for i in range(3)], right)
    vertex = -c1 / (2 * c2)
    return 2 * c2, math.exp(vertex), c0 + c1 * vertex + c2 * vertex**2


def law_losses(
    slope: float, intercept: float, students: list[float], factors: list[float], bend: float = 0.08
) -> list[tuple[float, float, float]]:
    """(student, teacher, loss) of exact parabolas whose minima lie on T* = slope S + intercept."""
    rows = []
    for s in students:
        best = slope * s + intercept
        rows += [(s, best * f, 5 - 0.1 * math.log(s) + bend * math.log(f) ** 2) for f in factors]
    return rows


def slope_standard_error(students: list[float], optima: list[float]) -> float:
    """Textbook standard error of a regression slope, from residuals."""
    n = len(students)
    mean_s, mean_t = sum(students) / n, sum(optima) / n
    spread = sum((s - mean_s) ** 2 for s in students)
    slope = sum((s - mean_s) * (t - mean_t) for s, t in zip(students, optima, strict=True)) / spread
    intercept = mean_t - slope * mean_s
    left = sum((t - slope * s - intercept) ** 2 for s, t in zip(students, optima, strict=True))
    return math.sqrt(left / (n - 2) / spread)
