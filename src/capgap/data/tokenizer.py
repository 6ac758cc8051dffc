"""Tokenizers: loading, training, and telling whether two of them give the same ids."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from capgap.errors import DataError, ModelError
from capgap.files import hash_file, hash_of

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_NO_TOKENIZER = "holds no tokenizer; tokenizer.json (or the model's own format) is missing"
# Parts of a tokenizer that decide which ids a text gets when no special tokens are added.
_PARTS = ("normalizer", "pre_tokenizer", "added_tokens")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder, or that of a hub name (`org/name`) where no such folder exists.

    Raises: ModelError if there is none or it is damaged.
    """
    path = Path(folder).expanduser()
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)) and not path.parent.exists()
    if not path.exists() and not is_hub_name:
        raise ModelError(f"{folder}: no such folder; give a model folder that holds a tokenizer")
    if path.is_file():
        raise ModelError(f"{folder}: is a file; give the folder that holds it")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path if path.exists() else folder), trust_remote_code=False, local_files_only=path.exists()
        )
        # Without any file of a tokenizer, some classes build an empty one.
        known = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    except Exception as error:  # damaged files surface as JSON, OS, key, value and library errors alike
        raise ModelError(_cannot_load(folder, path, error)) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not known:
        raise ModelError(f"{folder}: {_NO_TOKENIZER}")
    return tokenizer


def _cannot_load(folder: str | Path, path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if not path.exists():
        return f"{folder}: no such folder, and no tokenizer of that name on the hub ({reason})"
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as broken:
            return f"{file}: not valid JSON ({broken}); copy or download the file again"
        except OSError as unreadable:
            return f"{file}: cannot be read ({unreadable.strerror})"
    if any(path.glob("*token*")) or any(path.glob("*vocab*")):
        return f"{folder}: the tokenizer cannot be loaded ({reason}); copy or download its files again"
    return f"{folder}: {_NO_TOKENIZER}"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; equal texts give equal tokenizers.

    Every text can be encoded and decoded without loss. `<|endoftext|>` is id 0 and bos, eos and pad.

    Args:
        texts: read once.
        vocab_size: how many tokens it has at most; a small corpus may not hold that many pairs to merge.
    Raises: DataError if vocab_size is below 257 (the bytes and the end of text), or there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _BYTES + 1:
        least = f"the bytes and {END_OF_TEXT} take {_BYTES + 1}"
        raise DataError(f"a vocabulary of {vocab_size} is too small; {least}")
    rest = iter(texts)
    first = next(rest, None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on; give a source that holds text")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(itertools.chain([first], rest), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hex, of all that decides which ids a text gets when no special tokens are added.

    Vocabulary, merges, normaliser, pre-tokeniser and the added tokens count. Padding, truncation, the chat
    template and which token serves as eos or pad do not, so that a base model and its chat model can agree.
    """
    return hash_of(_facts(tokenizer))


def check_same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, name_a: str, name_b: str) -> None:
    """Raises ModelError, saying where they differ first, unless both give every text the same ids."""
    if tokenizer_hash(a) == tokenizer_hash(b):
        return
    raise ModelError(
        f"{name_a} and {name_b} have different tokenizers: {_difference(a, b)}; they must give every text the same ids"
    )


def _difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str:
    tokens_a, tokens_b = ({i: t for t, i in each.get_vocab().items()} for each in (a, b))
    size = f"{len(tokens_a)} and {len(tokens_b)} tokens" if len(tokens_a) != len(tokens_b) else ""
    for i in sorted(tokens_a.keys() | tokens_b.keys()):
        if tokens_a.get(i) != tokens_b.get(i):
            first = f"id {i} is {tokens_a.get(i, 'unused')!r} and {tokens_b.get(i, 'unused')!r}"
            return f"{size}, and {first}" if size else first
    facts_a, facts_b = _facts(a), _facts(b)
    merges = list(zip(facts_a.get("merges", []), facts_b.get("merges", []), strict=False))
    for number, (merge_a, merge_b) in enumerate(merges, start=1):
        if merge_a != merge_b:
            pairs = f"{' + '.join(merge_a)} and {' + '.join(merge_b)}"
            return f"the tokens are the same, but merge {number} is {pairs}"
    parts = [key for key in facts_a.keys() | facts_b.keys() if facts_a.get(key) != facts_b.get(key)]
    return f"the tokens are the same, but not the {', '.join(sorted(parts))}"


def _facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _slow_facts(tokenizer)
    whole = json.loads(backend.to_str())
    model = whole["model"]
    # Older files hold a merge as one string, newer ones as a pair.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.pop("merges", [])]
    facts = {key: whole.get(key) for key in _PARTS}
    return {**facts, "vocabulary": model.pop("vocab", None), "merges": merges, "model": model}


def _slow_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    added = {str(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    file = getattr(tokenizer, "vocab_file", None)
    content = hash_file(Path(file)) if file and Path(file).is_file() else None
    return {
        "vocabulary": tokenizer.get_vocab(),
        "added_tokens": added,
        "model": type(tokenizer).__name__,
        "vocabulary file": content,
    }


def separator_id(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> int:
    """The id put before each document: of the named token, else of eos, else of bos.

    Raises: DataError if the named token is not one token of the vocabulary, or there is nothing to choose.
    """
    if separator is not None:
        vocabulary = tokenizer.get_vocab()
        if separator not in vocabulary:
            known = ", ".join(map(str, tokenizer.all_special_tokens)) or "none"
            raise DataError(f"separator {separator!r} is not a token of the vocabulary; its special tokens are {known}")
        return vocabulary[separator]
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return token
    raise DataError("the tokenizer has neither an eos nor a bos token; name a token of it as the separator")
