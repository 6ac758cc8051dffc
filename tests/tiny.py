"""Tiny random models of the architectures that capgap can cut."""

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from capgap.models import new_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_config(kind: str = "llama", *, tied: bool = True, layers: int = 3, vocab: int = 64):
    """A config with 4 query heads in 2 groups of head_dim 8."""
    return AutoConfig.for_model(
        kind,
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


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
