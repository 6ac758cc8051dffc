"""Mixtures of experts: each expert a gated FFN, all of a layer in one weight; a router reads the hidden state."""

from dataclasses import replace

from capgap.anatomy.axes import EXPERT, HIDDEN, NEURON, Fields, Stacked, Weight
from capgap.anatomy.llama import ATTENTION, HEAD_NORMS, LLAMA, NORMS

_EXPERTS = (
    Weight("mlp.gate", EXPERT, HIDDEN),
    Weight("mlp.experts.gate_up_proj", EXPERT, Stacked(NEURON, NEURON), HIDDEN, bare=True),
    Weight("mlp.experts.down_proj", EXPERT, HIDDEN, NEURON, bare=True),
)

MIXTRAL = replace(
    LLAMA,
    model_types=("mixtral",),
    layer=(*NORMS, *ATTENTION, *_EXPERTS),
    masks={**LLAMA.masks, NEURON: ("mlp.experts.down_proj",)},
    fields=Fields(experts="num_local_experts"),
)

QWEN3_MOE = replace(
    MIXTRAL,
    model_types=("qwen3_moe",),
    layer=(*MIXTRAL.layer, *HEAD_NORMS),
    # A layer in mlp_only_layers has an FFN of another width.
    fields=Fields(
        neurons="moe_intermediate_size",
        experts="num_experts",
        fixed={"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
)
