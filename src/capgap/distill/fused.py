"""The loss fused with both heads: from hidden states to the loss and its gradients, chunk of tokens by chunk.

A chunk's logits are computed once, give loss and gradients at once, and are gone before the next chunk, so the
full logits of neither model exist, nor is any product done twice.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capgap.distill.divergences import Divergence
from capgap.distill.targets import ABSENT, Chunk, DenseChunk, SparseChunk, Targets
from capgap.errors import RecipeError
from capgap.models import Head

# Bytes of a chunk's logits: small enough for a CPU's caches, large enough to fill a GPU.
_CHUNK_BYTES = {"cpu": 32 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 512 * 2**20


@dataclass(frozen=True)
class Mix:
    """(1 - kd_weight) * CE + kd_weight * temperature^2 * divergence.

    Attributes:
        chunk_tokens: tokens whose logits exist at once; None chooses by device and vocabulary.
        compiled: what comes after a chunk's logits is compiled by torch.compile.
    """

    divergence: Divergence
    kd_weight: float
    temperature: float
    chunk_tokens: int | None = None
    compiled: bool = False

    def tokens_at_once(self, head: Head) -> int:
        """How many tokens' logits are made at once."""
        budget = _CHUNK_BYTES.get(head.weight_VH.device.type, _CHUNK_BYTES_ELSEWHERE)
        return self.chunk_tokens or max(32, budget // (4 * head.weight_VH.shape[0]))


class Sums(NamedTuple):
    """Summed over tokens, in nats: `loss` has gradients; `ce` and `kl` (the divergence) are for reading."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


def fused_loss(hidden_TH: Tensor, head: Head, label_T: Tensor, targets: Targets | None, mix: Mix) -> Sums:
    """The loss of T tokens, summed, with gradients for the hidden states and the head.

    Args:
        hidden_TH: the student's last hidden states.
        label_T: the next tokens' ids.
        targets: the teacher's word on the same tokens; None leaves the divergence out.
    Raises: RecipeError if the targets are sparse and the divergence is not the forward KL.
    """
    # Asked here: within a Function gradients are always off, and what it is told of its inputs does not say it either.
    wanted = torch.is_grad_enabled()
    return Sums(*_FusedLoss.apply(hidden_TH, head.weight_VH, head.bias_V, head, label_T, targets, mix, wanted))  # pyright: ignore


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        label_T: Tensor,
        targets: Targets | None,
        mix: Mix,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, size = hidden_TH.dtype, mix.tokens_at_once(head)
        head = head._replace(weight_VH=weight_VH.detach().to(dtype), bias_V=None if bias_V is None else bias_V.detach())
        grad_hidden = torch.empty_like(hidden_TH) if wanted else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if wanted else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted and bias_V is not None else None
        kd_weight = mix.kd_weight if targets is not None else 0.0
        ce, kl = hidden_TH.new_zeros((2,), dtype=torch.float32)
        kept = _Kept(min(size, len(hidden_TH)), weight_VH)
        loss_of = _compiled() if mix.compiled else chunk_loss
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for at in range(0, hidden_TH.shape[0], size):
                part = slice(at, at + size)
                hidden = hidden_TH[part]
                own, theirs, *free = kept.of(len(hidden))
                logits = head.logits(hidden, own)
                slope = _slope(logits, head)
                chunk = None if targets is None else targets.chunk(part, mix.temperature, len(weight_VH), theirs)
                # A compiled function makes its own tables.
                tables = (None, None) if mix.compiled else free
                chunk_ce, chunk_kl, grad = loss_of(logits, label_T[part], chunk, mix, kd_weight, tables)
                ce, kl = ce + chunk_ce, kl + chunk_kl
                if grad_hidden is None or grad_weight is None:
                    continue
                if slope is not None:
                    grad.mul_(slope)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(dtype)
                torch.mm(grad, head.weight_VH, out=grad_hidden[part])
                if dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden)
                else:
                    grad_weight += grad.T @ hidden
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.weight_dtype = weight_VH.dtype
        ctx.mark_non_differentiable(ce, kl)
        return (1 - kd_weight) * ce + kd_weight * mix.temperature**2 * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            (grad_weight * scale).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(ctx.weight_dtype),
            *(None,) * 5,
        )


def _slope(logits_TV: Tensor, head: Head) -> Tensor | float | None:
    """The derivative of the logits by what the linear layer gave; None where that is 1."""
    if head.cap is None:
        return None if head.scale == 1.0 else head.scale
    return (1 - (logits_TV / head.cap) ** 2).mul_(head.scale)


class _Kept:
    """Four tables [C, V] that every chunk is worked out in. On a CPU memory taken anew costs as much as the sums done
    in it; other devices keep it themselves."""

    def __init__(self, tokens: int, weight_VH: Tensor):
        wanted = weight_VH.device.type == "cpu"
        self._tables = torch.empty(4, tokens, len(weight_VH), dtype=torch.float32) if wanted else None

    def of(self, tokens: int) -> list[Tensor | None]:
        """The first rows of each table; None where memory is not kept."""
        return [None] * 4 if self._tables is None else [table[:tokens] for table in self._tables]


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(chunk_loss)


def chunk_loss(
    logits_TV: Tensor,
    label_T: Tensor,
    chunk: Chunk | None,
    mix: Mix,
    kd_weight: float,
    free: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """CE, divergence (both summed) and the gradient of the mixed loss by the student's logits [T, V].

    May overwrite the logits it is given, and the two tables of `free`.
    """
    at_one = mix.temperature == 1.0 and mix.divergence.kind == "forward_kl"
    if at_one and isinstance(chunk, DenseChunk):
        return _dense_forward_kl(logits_TV, label_T, chunk.logits_CV, kd_weight, free)
    rows = torch.arange(len(label_T), device=label_T.device)
    log_p = torch.log_softmax(logits_TV, -1)
    ce = -log_p[rows, label_T].sum()
    if chunk is None:
        kl, grad = ce.new_zeros(()), log_p.exp_().mul_(1 - kd_weight)
    elif at_one and isinstance(chunk, SparseChunk):
        kl, grad = _sparse_forward_kl(log_p, chunk, kd_weight)
    else:
        cool = log_p if mix.temperature == 1.0 else torch.log_softmax(logits_TV.div_(mix.temperature), -1)
        kl, kl_grad = _divergence(cool, chunk, mix.divergence)
        grad = log_p.exp_().mul_(1 - kd_weight).add_(kl_grad, alpha=kd_weight * mix.temperature)
    grad[rows, label_T] -= 1 - kd_weight
    return ce, kl, grad


def _dense_forward_kl(
    student_TV: Tensor, label_T: Tensor, teacher_TV: Tensor, kd_weight: float, free: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The most usual case in the fewest passes over memory: one softmax of each model, the logarithms of single tokens
    only. (1 - a)(p - y) + a (p - q) = p - a q - (1 - a) y."""
    rows = torch.arange(len(label_T), device=label_T.device)
    p_TV, q_TV = _softmax(student_TV, free[0]), _softmax(teacher_TV, free[1])
    # The likeliest token's probability, at least 1 / V, gives the normaliser.
    student_norm_T = student_TV.amax(-1) - p_TV.amax(-1).log()
    teacher_norm_T = teacher_TV.amax(-1) - q_TV.amax(-1).log()
    ce = (student_norm_T - student_TV[rows, label_T]).sum()
    gap_TV = teacher_TV.sub_(student_TV)
    kl_T = torch.bmm(q_TV[:, None], gap_TV[:, :, None]).flatten() + student_norm_T - teacher_norm_T
    grad = p_TV.sub_(q_TV, alpha=kd_weight)
    grad[rows, label_T] -= 1 - kd_weight
    return ce, kl_T.sum(), grad


def _softmax(logits_TV: Tensor, out_TV: Tensor | None) -> Tensor:
    if out_TV is None:
        return torch.softmax(logits_TV, -1)
    return torch.ops.aten._softmax.out(logits_TV, -1, False, out=out_TV)


def _divergence(log_p: Tensor, chunk: Chunk, divergence: Divergence) -> tuple[Tensor, Tensor]:
    if isinstance(chunk, DenseChunk):
        return divergence.value_and_gradient(log_p, torch.log_softmax(chunk.logits_CV, -1))
    if divergence.kind == "forward_kl":
        return _sparse_forward_kl(log_p, chunk, 1.0)
    raise RecipeError(
        f"distill.divergence = {divergence.kind}: a sparse teacher cache serves forward_kl only; "
        "make a dense cache, or run the teacher online"
    )


def _sparse_forward_kl(log_p: Tensor, chunk: SparseChunk, weight: float) -> tuple[Tensor, Tensor]:
    """KL(q || p), and p - weight * q [T, V]. Overwrites log p."""
    log_p_CK = log_p.gather(1, chunk.ids_CK)
    if chunk.tail_C is None:
        assert chunk.entropy_C is not None
        kl = -(chunk.weight_CK * log_p_CK).sum() - chunk.entropy_C.sum()
        return kl, log_p.exp_().scatter_add_(1, chunk.ids_CK, -weight * chunk.weight_CK)
    # All other tokens are one outcome. Its mass is the sum of theirs, taken in logarithms: one less the mass of the K
    # would be nothing but rounding where the student is sure. Entries of weight 0 name no token.
    known_CK, tail_C = chunk.weight_CK > 0, chunk.tail_C
    others = log_p.scatter_add_(1, chunk.ids_CK, torch.where(known_CK, -torch.inf, 0.0))
    log_tail_C = others.logsumexp(-1).clamp_min_(ABSENT)
    kl = _weighed_gap(chunk.weight_CK, log_p_CK) + _weighed_gap(tail_C, log_tail_C)
    grad = others.sub_(log_tail_C[:, None]).exp_().mul_((log_tail_C.exp() - weight * tail_C)[:, None])
    return kl, grad.scatter_add_(1, chunk.ids_CK, known_CK * log_p_CK.exp() - weight * chunk.weight_CK)


def _weighed_gap(q: Tensor, log_p: Tensor) -> Tensor:
    """The sum of q (log q - log p), a difference before it is a sum; 0 where q is."""
    return (q * (q.clamp_min(torch.finfo(q.dtype).tiny).log() - log_p)).sum()
