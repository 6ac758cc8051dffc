"""Text sources to documents, to packed tokens on disk, to the batch of step n."""

from capgap.data.batches import Batches
from capgap.data.pack import encode, pack
from capgap.data.packed import PackedSource, PackedTokens
from capgap.data.readers import Document
from capgap.data.sources import describe, documents, fingerprint
from capgap.data.tokenizer import (
    check_same_tokenizer,
    load_tokenizer,
    separator_id,
    tokenizer_hash,
    train_tokenizer,
)

__all__ = [
    "Batches",
    "Document",
    "PackedSource",
    "PackedTokens",
    "check_same_tokenizer",
    "describe",
    "documents",
    "encode",
    "fingerprint",
    "load_tokenizer",
    "pack",
    "separator_id",
    "tokenizer_hash",
    "train_tokenizer",
]
