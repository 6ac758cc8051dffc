"""The losses derived again, in float64 loops over single probabilities: shares no code with capgap.distill."""

import math

import numpy as np


def log_probabilities(logits, temperature: float = 1.0) -> list[float]:
    """Of one position."""
    scaled = [float(logit) / temperature for logit in logits]
    highest = max(scaled)
    log_total = highest + math.log(math.fsum(math.exp(s - highest) for s in scaled))
    return [s - log_total for s in scaled]


def mixed(log_a: float, log_b: float, share: float) -> float:
    """log of share * a + (1 - share) * b, where both may be too small for a float."""
    high, low = sorted((math.log(share) + log_a, math.log(1 - share) + log_b), reverse=True)
    return high + math.log1p(math.exp(low - high))


def kl(log_a: list[float], log_b: list[float]) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True))


def divergence(kind: str, student_logits, teacher_logits, *, mix: float | None = None, temperature: float = 1.0):
    """Of each position [T], in float64."""
    values = []
    for student_row, teacher_row in zip(student_logits, teacher_logits, strict=True):
        p, q = log_probabilities(student_row, temperature), log_probabilities(teacher_row, temperature)
        values.append(_of_one_position(kind, p, q, mix))
    return np.array(values)


def _of_one_position(kind: str, p: list[float], q: list[float], mix: float | None) -> float:
    if kind == "forward_kl":
        return kl(q, p)
    if kind == "reverse_kl":
        return kl(p, q)
    if kind == "total_variation":
        return math.fsum(abs(math.exp(a) - math.exp(b)) for a, b in zip(p, q, strict=True)) / 2
    assert mix is not None
    if kind == "jsd":
        m = [mixed(b, a, mix) for a, b in zip(p, q, strict=True)]
        return mix * kl(q, m) + (1 - mix) * kl(p, m)
    if kind == "skew_forward_kl":
        return kl(q, [mixed(b, a, mix) for a, b in zip(p, q, strict=True)])
    if kind == "skew_reverse_kl":
        return kl(p, [mixed(a, b, mix) for a, b in zip(p, q, strict=True)])
    raise ValueError(kind)


def cross_entropy(logits, labels) -> float:
    """Summed over the positions whose label is not negative."""
    return math.fsum(-log_probabilities(row)[y] for row, y in zip(logits, labels, strict=True) if y >= 0)


def top_k_kl(student_logits, ids, weights, tails, *, temperature: float = 1.0) -> float:
    """KL, summed, between distributions over the tokens of positive weight and one outcome more: any other token."""
    terms = []
    for row, names, shares, tail in zip(student_logits, ids, weights, tails, strict=True):
        p = log_probabilities(row, temperature)
        known = {int(name): float(share) for name, share in zip(names, shares, strict=True) if share > 0}
        terms += [share * (math.log(share) - p[name]) for name, share in known.items()]
        if tail > 0:
            others = [p[name] for name in range(len(p)) if name not in known]
            highest = max(others)
            log_other = highest + math.log(math.fsum(math.exp(o - highest) for o in others))
            terms.append(float(tail) * (math.log(tail) - log_other))
    return math.fsum(terms)


def sampled_kl(student_logits, ids, weights, entropies, *, temperature: float = 1.0) -> float:
    """The sample's cross-entropy less the teacher's own entropy, summed."""
    terms = []
    for row, names, shares, entropy in zip(student_logits, ids, weights, entropies, strict=True):
        p = log_probabilities(row, temperature)
        terms += [-float(share) * p[int(name)] for name, share in zip(names, shares, strict=True)]
        terms.append(-float(entropy))
    return math.fsum(terms)
