import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from capgap.data import (
    check_same_tokenizer,
    encode,
    load_tokenizer,
    separator_id,
    tokenizer_hash,
    train_tokenizer,
)
from capgap.errors import DataError, ModelError


def _copy(tokenizer, change=lambda backend: None):
    """A tokenizer from the same file after `change` of its JSON."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    change(whole)
    backend = Tokenizer.from_str(json.dumps(whole))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def test_training_is_deterministic_and_has_one_special_token(tokenizer, stdlib_texts):
    again = train_tokenizer(iter(stdlib_texts[:30]), 512)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_every_text_comes_back_whole(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text


def test_training_refuses_what_cannot_be(stdlib_texts):
    with pytest.raises(DataError, match=r"a vocabulary of 256 is too small; the bytes and .* take 257"):
        train_tokenizer(iter(stdlib_texts), 256)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(iter([]), 512)


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    check_same_tokenizer(tokenizer, loaded, "a", "b")
    assert separator_id(loaded, None) == 0


def test_the_hash_does_not_depend_on_padding_truncation_or_use(tokenizer):
    other = _copy(tokenizer)
    before = tokenizer_hash(other)
    other.pad_token = other.eos_token
    other(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert json.loads(other.backend_tokenizer.to_str())["padding"] is not None
    encode(other, ["<|endoftext|>"])
    assert tokenizer_hash(other) == before == tokenizer_hash(tokenizer)


def _swap_merges(whole):
    merges = whole["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _swap_tokens(whole):
    vocabulary = whole["model"]["vocab"]
    a, b = (next(t for t, i in vocabulary.items() if i == n) for n in (300, 301))
    vocabulary[a], vocabulary[b] = 301, 300


def _lowercase(whole):
    whole["normalizer"] = {"type": "Lowercase"}


def _prefix_space(whole):
    whole["pre_tokenizer"]["add_prefix_space"] = True


def _add_token(whole):
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    whole["added_tokens"].append({"id": 512, "content": "<new>", "special": True, **off})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_swap_merges, r"the tokens are the same, but merge 1 is .+ \+ .+ and .+ \+ .+"),
        (_swap_tokens, r"id 300 is '.+' and '.+'"),
        (_lowercase, "the tokens are the same, but not the normalizer"),
        (_prefix_space, "the tokens are the same, but not the pre_tokenizer"),
        (_add_token, "512 and 513 tokens, and id 512 is 'unused' and '<new>'"),
    ],
)
def test_whatever_changes_ids_changes_the_hash_and_is_named(tokenizer, change, said):
    other = _copy(tokenizer, change)
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)
    with pytest.raises(ModelError, match=f"student and teacher have different tokenizers: {said}"):
        check_same_tokenizer(tokenizer, other, "student", "teacher")


def test_a_token_that_is_added_later_changes_the_hash(tokenizer):
    other = _copy(tokenizer)
    other.add_tokens([AddedToken("import")])
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)


def test_separators(tokenizer):
    assert separator_id(tokenizer, None) == 0
    assert separator_id(tokenizer, "a") == tokenizer.convert_tokens_to_ids("a")
    with pytest.raises(DataError, match=r"separator '<sep>' is not a token .* are <\|endoftext\|>"):
        separator_id(tokenizer, "<sep>")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|endoftext|>")
    assert separator_id(bare, None) == 0
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="neither an eos nor a bos token"):
        separator_id(bare, None)


def test_loading_says_what_is_wrong(tokenizer, tmp_path):
    with pytest.raises(ModelError, match="gone: no such folder"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    with pytest.raises(ModelError, match=r"tokenizer\.json: is a file"):
        load_tokenizer(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"tokenizer\.json: not valid JSON"):
        load_tokenizer(tmp_path)
    file.write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_a_model_folder_without_tokenizer_is_no_tokenizer(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_no_traceback(monkeypatch):
    def refuse(*args, **keys):
        raise OSError("we couldn't connect\nmany more lines")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"^no-such-org/none: .* on the hub \(we couldn't connect\)$"):
        load_tokenizer("no-such-org/none")


REAL = ["tokenizers/gpt2-base", "tokenizers/tinyllama-1.1b-3T", "models/stories260k-hf"]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_keep_their_hash_when_saved_and_do_not_equal_each_other(test_data, tmp_path, name):
    tokenizer = load_tokenizer(test_data / name)
    tokenizer(["a", "b c d"], padding=False, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    for other in REAL:
        if other != name:
            with pytest.raises(ModelError, match=r"different tokenizers: .* tokens, and id \d+ is"):
                check_same_tokenizer(tokenizer, load_tokenizer(test_data / other), name, other)


@pytest.mark.parametrize("name", REAL)
def test_special_tokens_in_a_text_stay_text(test_data, name):
    tokenizer = load_tokenizer(test_data / name)
    text = "a" + "b".join(tokenizer.all_special_tokens) + " c"
    ids = encode(tokenizer, [text])[0]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == text


def test_a_real_folder_with_a_broken_file_names_it(test_data, tmp_path):
    for file in (test_data / "models/stories260k-hf").glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ModelError, match=r"tokenizer\.json: not valid JSON"):
        load_tokenizer(tmp_path)


def test_tokenizers_of_other_kinds_have_hashes_too():
    def build(words):
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    assert tokenizer_hash(build(["?", "a", "b"])) == tokenizer_hash(build(["?", "a", "b"]))
    assert tokenizer_hash(build(["?", "a", "b"])) != tokenizer_hash(build(["?", "b", "a"]))
