"""Tiny random models of the architectures that capgap can cut."""

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from capgap.models import new_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_DENSE = {"num_key_value_heads": 2, "head_dim": 8}
# What each architecture's config has beyond 4 query heads, hidden size 32 and 48 neurons.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 0.25},
    "gemma2": {**_DENSE, "sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_DENSE, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": _MIXED},
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": None},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48, "bias": True},
    "mixtral": {**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_DENSE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
ALL = (*ARCHITECTURES, *OTHERS)


def tiny_config(kind: str = "llama", *, tied: bool = True, layers: int = 3, vocab: int = 64):
    """A config with 4 query heads of head_dim 8, in 2 groups where the architecture has groups."""
    more = dict(OTHERS.get(kind, _DENSE))
    for name in ("layer_types", "no_rope_layers"):
        if name in more:
            more[name] = (more[name] * layers)[:layers]
    common = {
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if kind != "gpt2":
        common |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    layers_at = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    return AutoConfig.for_model(kind, **{**common, **more, layers_at: layers})


def tiny_model(kind: str = "llama", *, tied: bool = True, layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A model of `tiny_config`, every weight of which matters."""
    return telling(tiny_config(kind, tied=tied, layers=layers), seed=seed)


def telling(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """Random weights so large that logits are not all alike; norms and biases moved away from one and zero."""
    model = new_model(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4.0)
    return model


def ids(rows: int = 2, length: int = 12, vocab: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
