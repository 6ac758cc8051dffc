"""Parameters and FLOPs of a configuration, read off the model itself on the meta device."""

import json
from dataclasses import dataclass
from functools import lru_cache

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from capgap.errors import ModelError, ShapeError

# What transformers raises for a configuration whose values do not fit each other.
_UNFIT = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ZeroDivisionError,
    RuntimeError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters; a weight that two modules share is one weight.

    Attributes:
        total: all of them: the scale of the model.
        embedding: token and position tables, and the output head; a tied head is the token table.
        non_embedding: total - embedding, the N of scaling laws.
        matmul: the weights that multiply a token: linear layers, and the head even where it is tied; of a mixture's
            experts as many as a token is given. Neither biases, norms nor tables that are only looked up.
    """

    total: int
    embedding: int
    non_embedding: int
    matmul: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token; a multiplication and an addition are two."""

    forward: float
    training: float


@dataclass(frozen=True)
class Shape:
    """The sizes that cost depends on; `windows` holds each layer's attention window in tokens, or None."""

    model_type: str
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    layers: int
    windows: tuple[int | None, ...]

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim


def shape_of(config: PreTrainedConfig) -> Shape:
    """The sizes a configuration states, with the defaults its architecture gives to what it leaves out."""
    layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return Shape(
        model_type=config.model_type,
        vocab=config.vocab_size,
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        neurons=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        layers=layers,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


def count_parameters(config: PreTrainedConfig) -> Parameters:
    """Counts the parameters of the causal language model that `config` describes.

    The model is built on the meta device, without memory for its weights; a configuration is counted once.

    Raises: ModelError if transformers knows no causal language model of this configuration, or if the model
        has weights of which it cannot be said how often they multiply a token.
    """
    return _count(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))


def flops_per_token(config: PreTrainedConfig, context: int) -> Flops:
    """FLOPs per token, averaged over a sequence of `context` tokens under causal attention.

    Forward: 2 for each weight that multiplies the token, and for the scores and the weighted values of
    attention 2 * 2 * (heads * head_dim) a layer and visible token; a token sees (context + 1) / 2 tokens on
    average, fewer in a layer with a sliding window. Training is three times that: the backward pass costs two
    forward passes. Norms, activations, softmax and rotations are left out.

    Raises: ShapeError if `context` is not positive; ModelError as in `count_parameters`.
    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1, with the causal half of attention.
    """
    if context < 1:
        raise ShapeError(f"context = {context} must be at least 1 token")
    shape = shape_of(config)
    seen = sum(_tokens_seen(context, window) for window in shape.windows)
    forward = 2 * count_parameters(config).matmul + 4 * shape.query * seen
    return Flops(float(forward), 3.0 * forward)


def distill_flops_per_token(student: PreTrainedConfig, teacher: PreTrainedConfig, context: int) -> float:
    """FLOPs per token of distillation: the student's training and the teacher's forward pass."""
    return flops_per_token(student, context).training + flops_per_token(teacher, context).forward


def _tokens_seen(context: int, window: int | None) -> float:
    if window is None or window >= context:
        return (context + 1) / 2
    return (window * (window + 1) / 2 + (context - window) * window) / context


@lru_cache(maxsize=256)
def _count(kind: type[PreTrainedConfig], text: str) -> Parameters:
    what = f"configuration of type {kind.model_type!r}"
    try:
        config = kind.from_dict(json.loads(text))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except _UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{what}: no causal language model can be built from it ({reason})") from None
    weights = {id(p): p.numel() for p in model.parameters()}
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    head = model.get_output_embeddings()
    if head is not None:
        tables[id(head.weight)] = head.weight.numel()
    known = tables.keys() | {id(w) for w in linear}
    matmul = sum(w.numel() for w in linear)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in known:
            continue
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
        if ".experts." in name and parameter.ndim == 3 and len(parameter) == experts:
            matmul += parameter.numel() * config.num_experts_per_tok // experts
        elif name.endswith(".gate.weight"):  # a router
            matmul += parameter.numel()
        else:
            raise ModelError(
                f"{what}: {name} is neither a table, a linear layer nor a mixture's experts, so the cost of a token "
                "is not known"
            )
    total, embedding = sum(weights.values()), sum(tables.values())
    return Parameters(total, embedding, total - embedding, matmul)
