import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from capgap.data import PackedTokens, documents, encode, load_tokenizer, pack
from capgap.errors import DataError, StorageError
from capgap.recipe import Source

from .conftest import write_jsonl

# `capgap.data.pack` is the function; the module behind it is wanted here.
PACK = sys.modules["capgap.data.pack"]
BLOCK = 16


def _all(packed: PackedTokens) -> np.ndarray:
    return np.concatenate([shard for source in packed.sources for shard in source.shards])


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_packed_tokens_decode_to_the_documents(source, tokenizer, tmp_path):
    packed = pack([source], tokenizer, tmp_path, block=BLOCK, quiet=True, shard_tokens=5000)
    texts = [document.text for document in documents(source)]
    tokens = _all(packed)
    assert tokenizer.decode(tokens.tolist()).split("<|endoftext|>") == ["", *texts]
    assert packed.documents == len(texts) == int((tokens == packed.separator).sum())
    assert packed.bytes == sum(len(text.encode()) for text in texts)
    assert packed.tokens == len(tokens)
    assert tokens.dtype == np.uint16
    assert len(packed.sources[0].shards) > 3
    # Each shard begins with a separator, as it holds whole documents.
    assert all(shard[0] == 0 and len(shard) >= 5000 for shard in packed.sources[0].shards[:-1])
    packed.verify()
    packed.check_tokenizer(tokenizer)


def test_a_special_token_spelled_out_in_a_text_is_text(tokenizer, tmp_path):
    text = "before <|endoftext|> after " * 20
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    packed = pack([source], tokenizer, tmp_path / "p", block=BLOCK, quiet=True)
    tokens = _all(packed)
    assert (tokens == 0).sum() == 1
    assert tokenizer.decode(tokens[1:].tolist()) == text


def test_nothing_is_done_twice(source, tokenizer, tmp_path, monkeypatch):
    first = pack([source], tokenizer, tmp_path, block=BLOCK, quiet=True)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setattr(PACK, "documents", None)
    second = pack([source], tokenizer, tmp_path, block=8 * BLOCK, quiet=True)
    assert second.manifest == first.manifest
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_other_weights_change_the_manifest_and_not_the_shards(source, tokenizer, tmp_path, monkeypatch):
    sources = [source, source.model_copy(update={"weight": 2.0})]
    first = pack(sources, tokenizer, tmp_path, block=BLOCK, quiet=True)
    monkeypatch.setattr(PACK, "documents", None)
    double = [s.model_copy(update={"weight": 2 * s.weight}) for s in sources]
    assert pack(double, tokenizer, tmp_path, block=BLOCK, quiet=True).manifest_hash == first.manifest_hash
    other = pack([source, source], tokenizer, tmp_path, block=BLOCK, quiet=True)
    assert other.manifest_hash != first.manifest_hash
    assert [s.weight for s in other.sources] == [1.0, 1.0]
    assert PackedTokens.open(tmp_path).manifest == other.manifest


def test_the_hash_follows_the_tokens_and_not_paths_times_or_blocks(tokenizer, tmp_path):
    texts = [f"document {i} " * 20 for i in range(9)]

    def hash_of(name, texts, **keys):
        keys = {"block": BLOCK, "quiet": True, **keys}
        source = write_jsonl(tmp_path / name / f"{name}.jsonl", texts)
        return pack([source], tokenizer, tmp_path / f"{name}-p", **keys).manifest_hash

    first = hash_of("one", texts)
    os.utime(tmp_path / "one" / "one.jsonl", ns=(1, 1))
    assert hash_of("one", texts) == hash_of("two", texts, block=4 * BLOCK) == first
    assert hash_of("three", [*texts[:-1], "other"]) != first
    assert hash_of("four", texts, separator="a") != first


def test_another_input_starts_over(source, tokenizer, tmp_path):
    pack([source, source], tokenizer, tmp_path, block=BLOCK, quiet=True)
    (tmp_path / "notes.txt").write_text("of the user's")
    new = write_jsonl(tmp_path / "t" / "a.jsonl", ["something else " * 20])
    packed = pack([new], tokenizer, tmp_path, block=BLOCK, quiet=True)
    assert packed.documents == 1
    assert not list(tmp_path.glob("source-1/*"))
    assert (tmp_path / "notes.txt").read_text() == "of the user's"
    assert pack([new], tokenizer, tmp_path, block=BLOCK, separator="a", quiet=True).separator != 0


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("limit", [None, 30_000])
@pytest.mark.parametrize("writes", [1, 2, 3, 5, 8])
def test_packing_that_was_killed_goes_on_to_the_same_end(source, tokenizer, tmp_path, monkeypatch, writes, limit):
    keys = {"block": BLOCK, "quiet": True, "shard_tokens": 4000, "max_tokens": limit}
    whole = pack([source, source], tokenizer, tmp_path / "whole", **keys)
    real, encoded, left = PACK.write_json, [], [writes]

    def write(path, value):
        if left[0] == 0:
            raise _KilledError
        left[0] -= 1
        real(path, value)

    monkeypatch.setattr(PACK, "write_json", write)
    with pytest.raises(_KilledError):
        pack([source, source], tokenizer, tmp_path / "killed", **keys)
    (tmp_path / "killed" / "source-0").mkdir(exist_ok=True)
    (tmp_path / "killed" / "source-0" / ".00099.bin.12345678.tmp").write_text("half")
    with pytest.raises(DataError, match="packing has not ended: pack again"):
        PackedTokens.open(tmp_path / "killed")
    monkeypatch.setattr(PACK, "write_json", real)
    real_encode = PACK.encode
    monkeypatch.setattr(PACK, "encode", lambda t, texts: encoded.extend(texts) or real_encode(t, texts))
    resumed = pack([source, source], tokenizer, tmp_path / "killed", **keys)
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
    assert resumed.manifest == whole.manifest
    if limit is None:
        # One write is packing.json, each other one a shard that need not be made again.
        kept = [*whole.sources[0].shards, *whole.sources[1].shards][: writes - 1]
        assert len(encoded) == whole.documents - sum(int((shard == 0).sum()) for shard in kept)


def test_nothing_follows_a_cut_document_also_when_packing_goes_on(stdlib_texts, tokenizer, tmp_path, monkeypatch):
    # The short documents would fit into what the cut leaves free.
    source = write_jsonl(tmp_path / "a.jsonl", [stdlib_texts[0][:4000], "a", "b", "c"])
    real, left_free = PACK.write_json, []

    def killed_before_the_manifest(path, value):
        if path.name == "manifest.json":
            raise _KilledError
        real(path, value)

    for limit in range(400, 440):
        folder = tmp_path / str(limit)
        keys = {"block": BLOCK, "quiet": True, "max_tokens": limit}
        monkeypatch.setattr(PACK, "write_json", killed_before_the_manifest)
        with pytest.raises(_KilledError):
            pack([source], tokenizer, folder, **keys)
        before = _files(folder)
        monkeypatch.setattr(PACK, "write_json", real)
        left_free.append(limit - pack([source], tokenizer, folder, **keys).tokens)
        assert {name: data for name, data in _files(folder).items() if name != "manifest.json"} == before
    assert max(left_free) >= 2


KILL = """
import os, signal, sys
import capgap.data
module = sys.modules["capgap.data.pack"]
from capgap.recipe import Source
real, count = module.write_json, [0]
def write(path, value):
    count[0] += 1
    if count[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, value)
module.write_json = write
tokenizer = capgap.data.load_tokenizer(sys.argv[1])
source = Source(jsonl=sys.argv[2])
capgap.data.pack([source], tokenizer, sys.argv[3], block=16, quiet=True, shard_tokens=4000)
"""


def test_a_process_killed_by_the_system_leaves_a_folder_to_go_on_with(source, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    arguments = [str(tmp_path / "t"), str(source.jsonl), str(tmp_path / "p")]
    command = [sys.executable, "-c", KILL, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list((tmp_path / "p").glob("source-0/*.json"))) == 2
    keys = {"block": BLOCK, "quiet": True, "shard_tokens": 4000}
    pack([source], tokenizer, tmp_path / "p", **keys)
    pack([source], tokenizer, tmp_path / "whole", **keys)
    assert _files(tmp_path / "p") == _files(tmp_path / "whole")


@settings(max_examples=25, deadline=None)
@given(limit=st.integers(40, 12_000), shard=st.integers(50, 5000))
def test_a_limit_is_kept_and_the_bytes_fit_the_tokens(source, tokenizer, tmp_path_factory, limit, shard):
    folder = tmp_path_factory.mktemp("p")
    packed = pack([source], tokenizer, folder, block=BLOCK, max_tokens=limit, quiet=True, shard_tokens=shard)
    tokens = _all(packed)
    # A character can take several tokens, so a few may be left.
    assert limit - 8 < packed.tokens <= limit
    assert packed.tokens == len(tokens)
    text = tokenizer.decode(tokens.tolist())
    assert len(text.replace("<|endoftext|>", "").encode()) == packed.bytes
    whole = "".join("<|endoftext|>" + document.text for document in documents(source))
    assert whole.startswith(text)


def test_a_limit_is_shared_by_weight(source, tokenizer, tmp_path):
    sources = [source, source.model_copy(update={"weight": 3.0})]
    packed = pack(sources, tokenizer, tmp_path, block=BLOCK, max_tokens=8000, quiet=True)
    assert [round(s.tokens, -2) for s in packed.sources] == [2000, 6000]
    with pytest.raises(DataError, match=r"data\.0: jsonl: .*: its share of max_tokens, 1, is too small"):
        pack(sources, tokenizer, tmp_path, block=BLOCK, max_tokens=4, quiet=True, where="data")


def test_errors_of_sources_name_source_and_line(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2: field 'text' holds a number"):
        pack([Source(jsonl=f"{tmp_path}/a.jsonl")], tokenizer, tmp_path / "p", block=BLOCK, quiet=True)
    with pytest.raises(DataError, match=r"data\.train\.0: jsonl: .*gone\.jsonl matches no file"):
        pack([Source(jsonl=f"{tmp_path}/gone.jsonl")], tokenizer, tmp_path, block=BLOCK, where="data.train")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"sources\.0: jsonl: .*b\.jsonl: not one document that is not blank"):
        pack([Source(jsonl=f"{tmp_path}/b.jsonl")], tokenizer, tmp_path / "p", block=BLOCK, quiet=True)


def test_text_shorter_than_a_block_says_so_and_is_not_lost(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["abc" * 20])
    with pytest.raises(DataError, match=r"a\.jsonl gives \d+ tokens, less than one block of 4096 .* \d+"):
        pack([source], tokenizer, tmp_path / "p", block=4096, quiet=True)
    assert pack([source], tokenizer, tmp_path / "p", block=8, quiet=True).documents == 1


def test_a_tokenizer_that_gives_no_tokens_says_so(tmp_path):
    backend = Tokenizer(models.BPE({"<s>": 0, "x": 1}, []))
    backend.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    source = write_jsonl(tmp_path / "a.jsonl", ["bbb", "ccc"])
    with pytest.raises(DataError, match=r"a\.jsonl: the tokenizer gives no tokens for its 2 documents"):
        pack([source], silent, tmp_path / "p", block=BLOCK, quiet=True)


def test_large_vocabularies_take_four_bytes_and_larger_are_refused(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(PACK, "vocabulary_size", lambda tokenizer: 65_537)
    packed = pack([source], tokenizer, tmp_path / "p", block=BLOCK, max_tokens=500, quiet=True)
    assert _all(packed).dtype == np.uint32
    monkeypatch.setattr(PACK, "vocabulary_size", lambda tokenizer: 2**32 + 1)
    with pytest.raises(DataError, match="has ids up to 4294967296; packed tokens hold ids below 4294967296"):
        pack([source], tokenizer, tmp_path / "q", block=BLOCK, quiet=True)


def test_a_full_disk_is_named(source, tokenizer, tmp_path, monkeypatch):
    class _Full:
        def __call__(self, *args):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("capgap.files._sync", _Full())
    with pytest.raises(StorageError, match="the disk is full"):
        pack([source], tokenizer, tmp_path, block=BLOCK, quiet=True)
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(StorageError, match="a file is in the way"):
        pack([source], tokenizer, tmp_path / "file", block=BLOCK, quiet=True)


REAL = ["tokenizers/gpt2-base", "tokenizers/tinyllama-1.1b-3T", "models/stories260k-hf"]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_pack_real_text(test_data, tmp_path, name):
    tokenizer = load_tokenizer(test_data / name)
    source = Source(jsonl=f"{test_data}/text/wiki-c4-demo/c4_demo.jsonl")
    packed = pack([source], tokenizer, tmp_path, block=256, quiet=True, shard_tokens=50_000)
    texts = [document.text for document in documents(source)]
    tokens = _all(packed).tolist()
    assert packed.separator == tokenizer.eos_token_id
    expected = [[packed.separator, *ids] for ids in encode(tokenizer, texts)]
    assert tokens == [i for ids in expected for i in ids]
    ends = [i for i, token in enumerate(tokens) if token == packed.separator] + [len(tokens)]
    pieces = [tokens[a + 1 : b] for a, b in itertools.pairwise(ends)]
    decoded = [tokenizer.decode(piece, clean_up_tokenization_spaces=False) for piece in pieces]
    assert [d.strip() for d in decoded] == [t.strip() for t in texts]
