"""Run records made by a known law, for the report's tests."""

import math
import random

from capgap.records import RunRecord

STUDENTS = {"s58k": 58_000, "s120k": 120_000, "s260k": 260_000}
TEACHERS = {
    "t90k": 90_000, "t150k": 150_000, "t230k": 230_000,
    "t420k": 420_000, "t800k": 800_000, "t1.5M": 1_500_000,
}  # fmt: skip


def record(student, teacher=None, *, start="same", kind="distill", loss=3.0, seed=0, **more):
    start = teacher if start == "same" else start
    tokens = 3_000_000
    curve = [{"step": float(k), "tokens": tokens * k / 20, "loss": loss + 2.5 * math.exp(-k / 3)} for k in range(21)]
    values = {
        "run": f"{kind}-{student}-{start}-{teacher}-{seed}",
        "kind": kind, "student": student,
        "student_scale": STUDENTS[student],
        "teacher": teacher, "teacher_scale": TEACHERS.get(teacher or ""),
        "start": start, "start_scale": TEACHERS.get(start or ""), "tokens": tokens,
        "seed": seed, "loss": loss,
        "start_loss": loss + 2.5, "bits_per_byte": loss / 2.9, "curve": [{"step": 1.0, "lr": 1e-3}, *curve],
        "flops": 2.5e12, "seconds": 61.5, "device": "cpu", "recipe": {"distill": {"tokens": tokens}},
        "recipe_hash": "ab" * 32, "data_hash": "cd" * 32, "versions": {"capgap": "0.1.0", "torch": "2.9"},
    }  # fmt: skip
    return RunRecord(**(values | more))


def loss_by_law(student, teacher, slope=2.5, intercept=5_000, bend=0.035):
    best = slope * STUDENTS[student] + intercept
    return 4.6 - 0.12 * math.log(STUDENTS[student]) + bend * math.log(TEACHERS[teacher] / best) ** 2


def study(seeds=2, sigma=0.004, students=tuple(STUDENTS), teachers=tuple(TEACHERS)):
    noise = random.Random(1)
    return [
        record(s, t, loss=loss_by_law(s, t) + noise.gauss(0, sigma), seed=seed)
        for s in students
        for t in teachers
        if TEACHERS[t] > STUDENTS[s]
        for seed in range(seeds)
    ]


def others(student="s58k"):
    """The same student from scratch, and with its roles apart."""
    return [
        *(record(student, None, start=None, kind="scratch", loss=3.62 + 0.01 * k, seed=k) for k in range(2)),
        record(student, "t800k", start="t90k", loss=3.22),
        record(student, "t230k", start="t90k", loss=3.24),
    ]


TEACHER_LOSSES = {"t90k": 4.1, "t230k": 3.6, "t800k": 3.1}


def by_second_law(n: float, d: float, teacher: float | None = None) -> float:
    """Loss by the published second law, number by number."""
    alone = 1.220 + (3355 / n**0.408 + 18186 / d**0.431) ** 0.452
    if teacher is None:
        return alone
    bend = (1 + (teacher / (alone * 1.315)) ** (1 / 0.090)) ** (-522.61 * 0.090)
    return teacher + teacher**-2.549 * bend * (2243 / n**0.321 + 24181 / d**0.637) ** 0.764


def teachers():
    return [
        record("s58k", None, start=None, kind="pretrain", loss=loss, run=name).model_copy(
            update={"student": name, "student_scale": TEACHERS[name]}
        )
        for name, loss in TEACHER_LOSSES.items()
    ]


def from_random_weights(factor=1.0):
    """Runs by the published law, times `factor`, at two budgets a student."""
    found = []
    for s, n in STUDENTS.items():
        for d in (3_000_000, 9_000_000):
            more = {"start": None, "tokens": d}
            found.append(record(s, None, kind="scratch", loss=factor * by_second_law(n, d), run=f"{s}-{d}", **more))
            for t, own in TEACHER_LOSSES.items():
                loss = factor * by_second_law(n, d, own)
                found.append(record(s, t, loss=loss, run=f"{s}-{t}-{d}", **more))
    return found


MODELS = {f"t{k}k": k * 1000 for k in (26, 45, 77, 132, 227, 390, 670, 1150)}
SIZES = {"s20k": 20_000, "s40k": 40_000, "s80k": 80_000, "s160k": 160_000}


def run_of(student, start, teacher, per_parameter, seed, loss, condition=""):
    tokens = per_parameter * SIZES[student]
    names = f"{student}-from-{start}-by-{teacher}{condition}-{per_parameter}x-{seed}"
    one = record("s58k", "t90k", run=names, loss=loss, seed=seed)
    kind = "distill" if teacher else "scratch"
    return one.model_copy(
        update={
            "kind": kind, "student": student, "student_scale": SIZES[student], "start": start, "condition": condition,
            "start_scale": MODELS.get(start or ""), "teacher": teacher, "teacher_scale": MODELS.get(teacher or ""),
            "tokens": tokens, "curve": [],
        }
    )  # fmt: skip


def _bowl(teacher, best):
    return 3 + 0.05 * math.log(MODELS[teacher] / best) ** 2


def whole_study(best=lambda s, d: 3.2 * s * (d / 30) ** 0.3, budgets=(10, 30, 100), seeds=2, sigma=0.002, **more):
    """Coupled runs of four students at several budgets; the best teacher by `best`."""
    noise = random.Random(3)
    return [
        run_of(s, t, t, d, k, _bowl(t, best(SIZES[s], d)) + noise.gauss(0, sigma), **more)
        for s in SIZES
        for d in budgets
        for t in MODELS
        if MODELS[t] > 1.25 * SIZES[s]
        for k in range(seeds)
    ]


def roles_apart(students=("s20k", "s40k"), per_parameter=30, sigma=0.001, start_at=2.0, teacher_at=8.0, coupled=True):
    """Every start under every (other) teacher, the best at `start_at` S and `teacher_at` S."""
    noise = random.Random(4)
    found = []
    for s in students:
        larger = [t for t in MODELS if MODELS[t] > 1.25 * SIZES[s]]
        for p in larger:
            for t in larger:
                loss = 3 + 0.03 * math.log(MODELS[p] / SIZES[s] / start_at) ** 2
                loss += 0.03 * math.log(MODELS[t] / SIZES[s] / teacher_at) ** 2 + noise.gauss(0, sigma)
                if coupled or p != t:
                    found.append(run_of(s, p, t, per_parameter, 0, loss))
    return found
