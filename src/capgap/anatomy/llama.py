"""Llama and what is shaped like it: grouped queries, gated FFN, RMS norms, q/k/v biases and q/k norms where had."""

from capgap.anatomy.axes import HIDDEN, KV, NEURON, VOCAB, WITHIN_HEAD, Anatomy, Q, Weight

LLAMA = Anatomy(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    trunk=(
        Weight("model.embed_tokens", VOCAB, HIDDEN),
        Weight("model.norm", HIDDEN),
        Weight("lm_head", VOCAB, HIDDEN),
    ),
    layers_at="model.layers",
    layer=(  # Linear stores [out, in]
        Weight("input_layernorm", HIDDEN),
        Weight("self_attn.q_proj", Q, HIDDEN),
        Weight("self_attn.k_proj", KV, HIDDEN),
        Weight("self_attn.v_proj", KV, HIDDEN),
        Weight("self_attn.o_proj", HIDDEN, Q),
        Weight("self_attn.q_norm", WITHIN_HEAD),
        Weight("self_attn.k_norm", WITHIN_HEAD),
        Weight("post_attention_layernorm", HIDDEN),
        Weight("mlp.gate_proj", NEURON, HIDDEN),
        Weight("mlp.up_proj", NEURON, HIDDEN),
        Weight("mlp.down_proj", HIDDEN, NEURON),
    ),
    masks={
        # All that reads the hidden state reads it through a norm; the tied head's own gradient could not be
        # told from the embedding's, the final norm's can.
        HIDDEN: ("input_layernorm", "post_attention_layernorm", "model.norm"),
        Q: ("self_attn.o_proj",),
        NEURON: ("mlp.down_proj",),
    },
)
