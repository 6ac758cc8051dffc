"""Architectures that keep several projections in one weight, each in a layout of its own; and plain, ungated FFNs."""

from dataclasses import replace

from capgap.anatomy.axes import HIDDEN, KV, NEURON, POSITION, VOCAB, Fields, Grouped, Q, Stacked, Table, Weight
from capgap.anatomy.llama import ATTENTION, LLAMA, NORMS

GPT2 = Table(
    model_types=("gpt2",),
    trunk=(
        Weight("transformer.wte", VOCAB, HIDDEN),
        Weight("transformer.wpe", POSITION, HIDDEN),
        Weight("transformer.ln_f", HIDDEN),
        Weight("lm_head", VOCAB, HIDDEN),
    ),
    layers_at="transformer.h",
    layer=(  # Conv1D stores [in, out]
        Weight("ln_1", HIDDEN),
        Weight("attn.c_attn", HIDDEN, Stacked(Q, KV, KV), transposed=True),
        Weight("attn.c_proj", Q, HIDDEN, transposed=True),
        Weight("ln_2", HIDDEN),
        Weight("mlp.c_fc", HIDDEN, NEURON, transposed=True),
        Weight("mlp.c_proj", NEURON, HIDDEN, transposed=True),
    ),
    masks={HIDDEN: ("ln_1", "ln_2", "transformer.ln_f"), Q: ("attn.c_proj",), NEURON: ("mlp.c_proj",)},
    fields=Fields(
        layers="n_layer",
        hidden="n_embd",
        heads="n_head",
        kv_heads=None,
        head_dim=None,
        neurons="n_inner",
        by_layer=(),
        fixed={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
    ),
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
)

GPT_NEOX = Table(
    model_types=("gpt_neox",),
    trunk=(
        Weight("gpt_neox.embed_in", VOCAB, HIDDEN),
        Weight("gpt_neox.final_layer_norm", HIDDEN),
        Weight("lm_head", VOCAB, HIDDEN),
    ),
    layers_at="gpt_neox.layers",
    layer=(
        *NORMS,
        Weight("attention.query_key_value", Grouped(Q, KV, KV), HIDDEN),
        Weight("attention.dense", HIDDEN, Q),
        Weight("mlp.dense_h_to_4h", NEURON, HIDDEN),
        Weight("mlp.dense_4h_to_h", HIDDEN, NEURON),
    ),
    masks={
        HIDDEN: ("input_layernorm", "post_attention_layernorm", "gpt_neox.final_layer_norm"),
        Q: ("attention.dense",),
        NEURON: ("mlp.dense_4h_to_h",),
    },
    fields=Fields(kv_heads=None, head_dim=None, by_layer=()),
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
)

# Of the decoder with grouped queries; the older ones keep queries, keys and values in another order.
FALCON = Table(
    model_types=("falcon",),
    trunk=(
        Weight("transformer.word_embeddings", VOCAB, HIDDEN),
        Weight("transformer.ln_f", HIDDEN),
        Weight("lm_head", VOCAB, HIDDEN),
    ),
    layers_at="transformer.h",
    layer=(
        Weight("ln_attn", HIDDEN),
        Weight("ln_mlp", HIDDEN),
        Weight("input_layernorm", HIDDEN),  # instead of the two, where a layer has one norm
        Weight("self_attention.query_key_value", Grouped(Q, KV, KV), HIDDEN),
        Weight("self_attention.dense", HIDDEN, Q),
        Weight("mlp.dense_h_to_4h", NEURON, HIDDEN),
        Weight("mlp.dense_4h_to_h", HIDDEN, NEURON),
    ),
    masks={
        HIDDEN: ("ln_attn", "ln_mlp", "input_layernorm", "transformer.ln_f"),
        Q: ("self_attention.dense",),
        NEURON: ("mlp.dense_4h_to_h",),
    },
    fields=Fields(
        kv_heads="num_kv_heads",
        head_dim=None,
        neurons="ffn_hidden_size",
        by_layer=(),
        fixed={"new_decoder_architecture": True, "alibi": False},
    ),
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
)

PHI3 = replace(
    LLAMA,
    model_types=("phi3",),
    layer=(
        *NORMS,
        Weight("self_attn.qkv_proj", Stacked(Q, KV, KV), HIDDEN),
        Weight("self_attn.o_proj", HIDDEN, Q),
        Weight("mlp.gate_up_proj", Stacked(NEURON, NEURON), HIDDEN),
        Weight("mlp.down_proj", HIDDEN, NEURON),
    ),
    fields=Fields(),
)

STARCODER2 = replace(
    LLAMA,
    model_types=("starcoder2",),
    layer=(*NORMS, *ATTENTION, Weight("mlp.c_fc", NEURON, HIDDEN), Weight("mlp.c_proj", HIDDEN, NEURON)),
    masks={**LLAMA.masks, NEURON: ("mlp.c_proj",)},
    fields=Fields(),
)
