"""A checkpoint that is cut on disk becomes what is cut in memory; what is damaged is named, nothing is half written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from capgap.anatomy import Shape, anatomy_of
from capgap.errors import ModelError
from capgap.models import load_model
from capgap.prune import Keep, Scores, cut_folder, cut_model, select
from tiny import ALL, ids, tiny_model


def some(anatomy) -> Keep:
    """Fewer of everything, chosen at random, other heads, neurons and experts in each layer."""
    have, fewer = anatomy.shape, 1 if anatomy.shape.kv_heads == 2 else 3
    experts = () if have.experts is None else (have.experts,)
    scores = Scores(torch.rand(32), torch.rand(3, have.kv_heads), torch.rand(3, *experts, 48))
    if have.experts is not None:
        scores = replace(scores, experts=torch.rand(3, have.experts))
    shape = Shape(2, anatomy.hidden_of(fewer) or 24, fewer, 40, None if have.experts is None else 3)
    return select(scores, shape)


@pytest.fixture
def start(tmp_path):
    """A checkpoint of several files."""

    def save(kind: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float32):
        model = tiny_model(kind, tied=tied).to(dtype)  # pyright: ignore[reportArgumentType]
        model.save_pretrained(tmp_path / "start", max_shard_size="16KB")
        assert len(list((tmp_path / "start").glob("*.safetensors"))) > 2
        return model, tmp_path / "start"

    return save


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_what_is_cut_on_disk_is_what_is_cut_in_memory(kind, tied, start, tmp_path):
    model, folder = start(kind, tied=tied, dtype=torch.bfloat16)
    anatomy = anatomy_of(model.config)
    keep = some(anatomy)
    cut_folder(folder, keep, tmp_path / "student", tokenizer=None, lineage={"stage": "prune"}, quiet=True)
    wanted = cut_model(model, anatomy, keep).eval()
    found = load_model(tmp_path / "student", dtype=torch.bfloat16).eval()
    assert anatomy_of(found.config).shape == keep.shape
    for (name, weight), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert found.generate(ids(1, 4), max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 6)
    assert json.loads((tmp_path / "student" / "capgap.json").read_text()) == {"stage": "prune"}
    assert (tmp_path / "student" / "generation_config.json").is_file()
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in wanted.parameters())


def test_names_that_a_checkpoint_shortens_are_understood_and_kept(start, tmp_path):
    """GPT-2's own checkpoints leave out `transformer.` and hold masks that nothing reads."""
    model, folder = start("gpt2")
    for file in folder.glob("*.safetensors"):
        weights = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
        save_file(weights | {f"h.0.attn.bias{file.stem[6:11]}": torch.ones(8)}, file)
    (folder / "model.safetensors.index.json").unlink()
    keep = some(anatomy_of(model.config))
    cut_folder(folder, keep, tmp_path / "student", tokenizer=None, lineage={}, quiet=True)
    found = load_model(tmp_path / "student").eval()
    assert torch.equal(cut_model(model, anatomy_of(model.config), keep).eval()(ids()).logits, found(ids()).logits)
    names = {n for file in (tmp_path / "student").glob("*.safetensors") for n in load_file(file)}
    assert "h.1.attn.c_attn.weight" in names
    assert not any(".attn.bias" in name for name in names)


@pytest.mark.parametrize("stored", ["both", "the head", "others"])
def test_a_tied_head_may_lie_beside_the_embedding_or_in_its_place(stored, start, tmp_path):
    model, folder = start("llama", tied=True)
    (folder / "model.safetensors.index.json").unlink()
    file = next(f for f in folder.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() + (1 if stored == "others" else 0)
    if stored == "the head":
        weights.pop("model.embed_tokens.weight")
    save_file(weights, file)
    keep = some(anatomy_of(model.config))
    if stored == "others":
        with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            cut_folder(folder, keep, tmp_path / "student", tokenizer=None, lineage={}, quiet=True)
        return
    cut_folder(folder, keep, tmp_path / "student", tokenizer=None, lineage={}, quiet=True)
    found = load_model(tmp_path / "student").eval()
    assert torch.equal(cut_model(model, anatomy_of(model.config), keep).eval()(ids()).logits, found(ids()).logits)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-100])


def without_a_weight(file):
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)


def of_another_shape(file):
    weights = load_file(file)
    first = sorted(weights)[0]
    save_file(weights | {first: torch.ones(3, 5)}, file)


def not_finite(file):
    weights = load_file(file)
    for weight in weights.values():
        weight.fill_(float("nan"))
    save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_off, r"model-00002-of-.*damaged or cut off"),
        (lambda file: file.unlink(), r"model-00002-of-.*missing, though model\.safetensors\.index\.json names it"),
        (without_a_weight, r"model-00002-of-.*holds no model\.layers.*index\.json says so"),
        (of_another_shape, r"model-00002-of-.*has shape \[3, 5\]; config\.json asks for"),
        (not_finite, r"model-00002-of-.*NaN"),
    ],
)
def test_damage_is_named_and_nothing_is_written(damage, said, start, tmp_path):
    model, folder = start()
    damage(sorted(folder.glob("*.safetensors"))[1])
    with pytest.raises(ModelError, match=said):
        cut_folder(folder, some(anatomy_of(model.config)), tmp_path / "student", tokenizer=None, lineage={}, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["start"]


def test_an_incomplete_or_quantised_checkpoint_is_refused(start, tmp_path):
    model, folder = start("mixtral")
    keep = some(anatomy_of(model.config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = next(name for name in index["weight_map"] if ".experts.2." in name)
    file = folder / index["weight_map"].pop(lost)
    weights = load_file(file)
    weights.pop(lost)
    save_file(weights, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"has only \d of the parts of model\.layers\.0\.mlp\.experts"):
        cut_folder(folder, keep, tmp_path / "student", tokenizer=None, lineage={}, quiet=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"config\.json: has a quantization_config"):
        cut_folder(folder, keep, tmp_path / "student", tokenizer=None, lineage={}, quiet=True)


PEAK = """
import re, sys, torch
from pathlib import Path
from capgap.anatomy import anatomy_of, Shape
from capgap.models import load_config
from capgap.prune import Scores, cut_folder, select
start = Path(sys.argv[1])
def peak():  # getrusage's would be that of the process which started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
anatomy = anatomy_of(load_config(start))
have = anatomy.shape
scores = Scores(torch.rand(have.hidden), torch.rand(have.layers, have.kv_heads), torch.rand(have.layers, have.neurons))
keep = select(scores, Shape(have.layers, have.hidden * 3 // 4, have.kv_heads * 3 // 4, have.neurons * 3 // 4))
before = peak()
cut_folder(start, keep, start.parent / "student", tokenizer=None, lineage={}, quiet=True)
print(peak() - before)
"""


def test_memory_goes_to_a_weight_and_a_file_not_to_the_model(tmp_path):
    """A model of half a gigabyte in float32, in files of 50 MB, whose largest weight has 32 MB."""
    from transformers import LlamaConfig

    from capgap.models import new_model

    config = LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = new_model(config, seed=0)
    model.save_pretrained(tmp_path / "start", max_shard_size="50MB")
    whole, largest = (f(p.nbytes for p in model.parameters()) for f in (sum, max))
    del model
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "start"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    limit = 2 * largest + 50 * 2**20
    assert whole > 3 * limit
    assert int(done.stdout) < limit
