"""Llama and what is shaped like it: grouped queries, gated FFN, RMS norms, q/k/v biases and q/k norms where had."""

from dataclasses import replace

from capgap.anatomy.axes import HIDDEN, KV, NEURON, VOCAB, WITHIN_HEAD, Fields, Q, Table, Weight

TRUNK = (
    Weight("model.embed_tokens", VOCAB, HIDDEN),
    Weight("model.norm", HIDDEN),
    Weight("lm_head", VOCAB, HIDDEN),
)
ATTENTION = (  # Linear stores [out, in]
    Weight("self_attn.q_proj", Q, HIDDEN),
    Weight("self_attn.k_proj", KV, HIDDEN),
    Weight("self_attn.v_proj", KV, HIDDEN),
    Weight("self_attn.o_proj", HIDDEN, Q),
)
HEAD_NORMS = (Weight("self_attn.q_norm", WITHIN_HEAD), Weight("self_attn.k_norm", WITHIN_HEAD))
NORMS = (Weight("input_layernorm", HIDDEN), Weight("post_attention_layernorm", HIDDEN))
FFN = (
    Weight("mlp.gate_proj", NEURON, HIDDEN),
    Weight("mlp.up_proj", NEURON, HIDDEN),
    Weight("mlp.down_proj", HIDDEN, NEURON),
)

LLAMA = Table(
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    trunk=TRUNK,
    layers_at="model.layers",
    layer=(*NORMS, *ATTENTION, *HEAD_NORMS, *FFN),
    masks={
        # All that reads the hidden state reads it through a norm; the tied head's own gradient could not be
        # told from the embedding's, the final norm's can.
        HIDDEN: ("input_layernorm", "post_attention_layernorm", "model.norm"),
        Q: ("self_attn.o_proj",),
        NEURON: ("mlp.down_proj",),
    },
    fields=Fields(by_layer=("layer_types", "no_rope_layers")),
)

# A norm before and one after each block; only those before are read.
GEMMA2 = replace(
    LLAMA,
    model_types=("gemma2",),
    layer=(
        *NORMS,
        Weight("pre_feedforward_layernorm", HIDDEN),
        Weight("post_feedforward_layernorm", HIDDEN),
        *ATTENTION,
        *FFN,
    ),
    masks={**LLAMA.masks, HIDDEN: ("input_layernorm", "pre_feedforward_layernorm", "model.norm")},
    fields=Fields(),
    norm_offset=1.0,
    scaled_embedding=True,
)
GEMMA3 = replace(GEMMA2, model_types=("gemma3_text",), layer=(*GEMMA2.layer, *HEAD_NORMS))

# Norms after the blocks only: the blocks read the hidden state as it is. The q/k norms run over all heads.
OLMO2 = replace(
    LLAMA,
    model_types=("olmo2",),
    layer=(
        Weight("post_attention_layernorm", HIDDEN),
        Weight("post_feedforward_layernorm", HIDDEN),
        Weight("self_attn.q_norm", Q),
        Weight("self_attn.k_norm", KV),
        *ATTENTION,
        *FFN,
    ),
    masks={
        **LLAMA.masks,
        HIDDEN: (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "model.norm",
        ),
    },
    fields=Fields(),
)
