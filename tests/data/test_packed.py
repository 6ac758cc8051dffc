import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.data import PackedTokens, pack, train_tokenizer
from capgap.errors import DataError

from .conftest import write_jsonl

BLOCK = 16


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    shard=st.integers(1, 100),
    block=st.integers(1, 40),
)
def test_blocks_and_stream_predict_each_token_once(tokenizer, tmp_path_factory, lengths, shard, block):
    folder = tmp_path_factory.mktemp("p")
    texts = ["".join(chr(97 + (i * k) % 26) for k in range(n)) for i, n in enumerate(lengths)]
    source = write_jsonl(folder / "a.jsonl", texts)
    packed = pack([source], tokenizer, folder / "p", block=1, quiet=True, shard_tokens=shard)
    labels = np.concatenate([piece[1:] for piece in packed.stream(block)])
    assert labels.tolist() == np.concatenate([s[1:] for s in packed.sources[0].shards]).tolist()
    assert all(2 <= len(piece) <= block + 1 and piece.dtype == np.int64 for piece in packed.stream(block))
    full = [piece for piece in packed.stream(block) if len(piece) == block + 1]
    assert len(full) == packed.sources[0].blocks(block)


@pytest.fixture
def folder(source, tokenizer, tmp_path) -> Path:
    return pack([source], tokenizer, tmp_path, block=BLOCK, quiet=True, shard_tokens=5000).folder


def test_opening_a_damaged_folder_names_the_file(folder, source, tokenizer):
    shard = folder / "source-0" / "00001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"00001\.bin: has [\d,]+ bytes, the manifest says [\d,]+; .*again"):
        PackedTokens.open(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"00001\.bin: no such file; .*pack again"):
        PackedTokens.open(folder)
    repaired = pack([source], tokenizer, folder, block=BLOCK, quiet=True, shard_tokens=5000)
    assert shard.read_bytes() == data
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match=r"00001\.bin: its SHA-256 begins with .*damaged: .*pack again"):
        PackedTokens.open(folder).verify()
    assert repaired.manifest == PackedTokens.open(folder).manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, r"manifest\.json: has version 99; this capgap reads version 1: pack again"),
        ({"dtype": None}, r"manifest\.json: dtype missing; remove the folder and pack again"),
        (None, r"manifest\.json line 1: not valid JSON .*; remove the folder and pack again"),
        ("gone", r"manifest\.json: no such file; .*pack again"),
    ],
)
def test_a_manifest_that_is_not_right_is_named(folder, change, message):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if change == "gone":
        path.unlink()
    elif change is None:
        path.write_text("{broken")
    else:
        merged = {**manifest, **change}
        path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    with pytest.raises(DataError, match=message):
        PackedTokens.open(folder)


def test_another_tokenizer_does_not_fit(folder, stdlib_texts):
    other = train_tokenizer(iter(stdlib_texts[30:]), 400)
    with pytest.raises(DataError, match=r"another tokenizer \(hash \w+, 512 ids\) than .*, 400 ids\)"):
        PackedTokens.open(folder).check_tokenizer(other)
