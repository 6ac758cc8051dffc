"""Divergences between the teacher's distribution q and the student's p over the next token, with their gradients.

Each is a function of log p and log q, [T, V] in float32, and returns its sum over tokens and its gradient by the
student's (divided) logits. Where d is the derivative of the summand by p, that gradient is p * (d - sum p d).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from capgap.errors import RecipeError, ShapeError

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
ValueAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Divergence:
    """A divergence of the student p from the teacher q.

    Attributes:
        kind: forward_kl, KL(q || p) (Hinton et al. 2015, arXiv:1503.02531); reverse_kl, KL(p || q) (MiniLLM,
            arXiv:2306.08543); jsd, beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (GKD,
            arXiv:2306.13649, equation 1); skew_forward_kl, KL(q || alpha q + (1 - alpha) p), and skew_reverse_kl,
            KL(p || (1 - alpha) q + alpha p) (DistiLLM, arXiv:2402.03898, section 3); total_variation, half the sum
            of |p - q| (GKD, table of divergences).
        mix: beta of the jsd, alpha of the skewed ones, between 0 and 1; the others have none.
    Raises: RecipeError on an unknown kind or an impossible mix.
    """

    kind: Kind = "forward_kl"
    mix: float | None = None

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise RecipeError(f"divergence = {self.kind!r}: not one of {', '.join(get_args(Kind))}")
        mixed = self.kind in _DEFAULT_MIX
        if self.mix is None and mixed:
            object.__setattr__(self, "mix", _DEFAULT_MIX[self.kind])
        elif self.mix is not None and not mixed:
            raise RecipeError(f"divergence {self.kind} has no mix; found {self.mix}")
        if self.mix is not None and not 0 < self.mix < 1:
            raise RecipeError(f"mix = {self.mix} of {self.kind} must lie between 0 and 1")

    def __call__(self, student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The divergence summed over tokens.

        Args:
            student_logits_TV: [T, V], receives gradients.
            teacher_logits_TV: [T, V], receives none.
            temperature: tau > 0. The factor tau**2 is the caller's choice.
        Returns: scalar float32, nats (total variation: a probability).
        Raises: ShapeError if the shapes differ.
        """
        if student_logits_TV.shape != teacher_logits_TV.shape:
            raise ShapeError(
                f"student logits {tuple(student_logits_TV.shape)} and teacher logits "
                f"{tuple(teacher_logits_TV.shape)} must have one shape"
            )
        return _Dense.apply(
            student_logits_TV.float() / temperature, teacher_logits_TV.detach().float() / temperature, self
        )  # pyright: ignore[reportReturnType]

    def value_and_gradient(self, log_p_TV: Tensor, log_q_TV: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over tokens, and its gradient [T, V] by the logits that log p is the log-softmax of."""
        if self.kind == "forward_kl":
            return _forward_kl(log_p_TV, log_q_TV)
        if self.kind == "reverse_kl":
            return _reverse_kl(log_p_TV, log_q_TV)
        if self.kind == "total_variation":
            return _total_variation(log_p_TV, log_q_TV)
        assert self.mix is not None
        return _MIXED[self.kind](log_p_TV, log_q_TV, self.mix)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TV: Tensor, teacher_TV: Tensor, divergence: Divergence) -> Tensor:
        log_p, log_q = torch.log_softmax(student_TV, -1), torch.log_softmax(teacher_TV, -1)
        value, gradient = divergence.value_and_gradient(log_p, log_q)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], None, None


def _through_softmax(p_TV: Tensor, by_p_TV: Tensor) -> Tensor:
    return p_TV * (by_p_TV - (p_TV * by_p_TV).sum(-1, keepdim=True))


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(), log_p.exp() - q


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, difference = log_p.exp(), log_p - log_q
    return (p * difference).sum(), _through_softmax(p, difference)


def _total_variation(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    difference = p - log_q.exp()
    return 0.5 * difference.abs().sum(), _through_softmax(p, 0.5 * difference.sign())


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    p, q, by_p = log_p.exp(), log_q.exp(), (1 - beta) * (log_p - log_m)
    value = beta * (q * (log_q - log_m)).sum() + (p * by_p).sum()
    return value, _through_softmax(p, by_p)


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_q + math.log(alpha), log_p + math.log1p(-alpha))
    ratio = log_q - log_m
    return (log_q.exp() * ratio).sum(), _through_softmax(log_p.exp(), (alpha - 1) * ratio.exp())


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha))
    p, ratio = log_p.exp(), log_p - log_m
    return (p * ratio).sum(), _through_softmax(p, ratio - alpha * ratio.exp())


_DEFAULT_MIX = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
_MIXED = {"jsd": _jsd, "skew_forward_kl": _skew_forward_kl, "skew_reverse_kl": _skew_reverse_kl}
