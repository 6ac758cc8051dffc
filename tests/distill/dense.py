"""The loss as one reads it in the papers: whole logits, float64, gradients by autograd."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from capgap.distill import Mix
from capgap.distill.targets import ABSENT
from capgap.models import Head

KINDS = {
    "forward_kl": None,
    "reverse_kl": None,
    "jsd": 0.3,
    "skew_forward_kl": 0.2,
    "skew_reverse_kl": 0.2,
    "total_variation": None,
}


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return functional.kl_div(log_b, log_a, reduction="sum", log_target=True)


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    weights = torch.tensor([share, 1 - share], dtype=log_a.dtype).log()
    return torch.logsumexp(torch.stack([log_a, log_b], -1) + weights, -1)


def dense_divergence(kind: str, mix: float | None, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Summed, of log-probabilities [T, V]."""
    if kind == "forward_kl":
        return _kl(log_q, log_p)
    if kind == "reverse_kl":
        return _kl(log_p, log_q)
    if kind == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum() / 2
    assert mix is not None
    if kind == "jsd":
        log_m = _mixture(log_q, log_p, mix)
        return mix * _kl(log_q, log_m) + (1 - mix) * _kl(log_p, log_m)
    if kind == "skew_forward_kl":
        return _kl(log_q, _mixture(log_q, log_p, mix))
    return _kl(log_p, _mixture(log_p, log_q, mix))


def dense_logits(hidden_TH: Tensor, head: Head) -> Tensor:
    """In float64."""
    logits = hidden_TH.double() @ head.weight_VH.double().T
    logits = logits if head.bias_V is None else logits + head.bias_V.double()
    logits = logits * head.scale
    return logits if head.cap is None else torch.tanh(logits / head.cap) * head.cap


def dense_teacher(logits: list[Tensor], weights: list[float], temperature: float, vocabulary: int) -> Tensor:
    """log q [T, V] of one or several teachers: rows past the student's are dropped, rows they lack get no mass."""
    parts = []
    for logits_TV, weight in zip(logits, weights, strict=True):
        whole = torch.full((len(logits_TV), vocabulary), ABSENT, dtype=torch.float64)
        kept = logits_TV.double()[:, :vocabulary] / temperature
        whole[:, : kept.shape[1]] = kept
        parts.append(torch.log_softmax(whole, -1) + math.log(weight))
    return torch.logsumexp(torch.stack(parts), 0)


def dense_loss(logits_TV: Tensor, label_T: Tensor, log_q_TV: Tensor, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, CE and divergence, summed over the tokens whose label is not negative."""
    ce = functional.cross_entropy(logits_TV.double(), label_T, reduction="sum", ignore_index=-100)
    scored = label_T >= 0
    log_p = torch.log_softmax(logits_TV.double()[scored] / mix.temperature, -1)
    kl = dense_divergence(mix.divergence.kind, mix.divergence.mix, log_p, log_q_TV[scored])
    return (1 - mix.kd_weight) * ce + mix.kd_weight * mix.temperature**2 * kl, ce, kl
