import itertools
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from capgap.data import documents, train_tokenizer
from capgap.recipe import Source


def write_jsonl(path: Path, texts: list[str]) -> Source:
    """Writes one row a text, and gives the source that reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Source(jsonl=str(path))


@pytest.fixture(scope="session")
def stdlib_texts() -> list[str]:
    """Sixty files of the standard library: real text that every machine has."""
    stream = documents(Source(python_stdlib=True))
    return [document.text for document in itertools.islice(stream, 60)]


@pytest.fixture(scope="session")
def tokenizer(stdlib_texts: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(stdlib_texts[:30]), 512)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, stdlib_texts: list[str]) -> Source:
    """Sixty documents of at most 3,000 characters."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "a.jsonl", [text[:3000] for text in stdlib_texts])
