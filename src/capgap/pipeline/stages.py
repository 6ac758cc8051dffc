"""The stages. A stage's folder holds capgap.json; equal inputs there mean that its work is done."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from capgap import evaluate
from capgap.data import PackedTokens, pack
from capgap.files import LINEAGE, hash_of, read_json, read_lineage, write_json
from capgap.models import default_device, hash_model, load_model
from capgap.recipe import Data


@dataclass(frozen=True)
class Corpus:
    """Packed training and held-out text, the block length, and the tokenizer both were made with.

    Attributes: unscored_id: the separator's, where training does not score it.
    """

    train: PackedTokens
    held_out: PackedTokens
    block: int
    tokenizer: PreTrainedTokenizerBase
    unscored_id: int | None = None

    @property
    def hash(self) -> str:
        """Changes with any token of either part, or the block length."""
        return hash_of([self.train.manifest_hash, self.held_out.manifest_hash, self.block])


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {name: version(name) for name in ("capgap", "torch", "transformers", "tokenizers", "numpy")} | {
        "python": platform.python_version()
    }


def open_corpus(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    held_out_tokens: int,
    train_tokens: int | None = None,
    quiet: bool = False,
) -> Corpus:
    """Packs training and held-out text into `folder`, or opens what is there."""
    common: dict[str, Any] = {"block": data.block, "separator": data.separator, "quiet": quiet}
    train = pack(data.train, tokenizer, folder / "train", max_tokens=train_tokens, **common)
    held_out = pack(data.held_out, tokenizer, folder / "held-out", max_tokens=held_out_tokens, **common)
    return Corpus(train, held_out, data.block, tokenizer, None if data.score_separators else train.separator)


def is_done(folder: Path, inputs: Any) -> bool:
    """Whether the folder was made from equal inputs."""
    lineage = read_lineage(folder)
    return lineage is not None and lineage.get("inputs_hash") == hash_of(inputs)


def lineage_of(stage: str, inputs: Any, **more: Any) -> dict[str, Any]:
    """What a stage's capgap.json holds."""
    return {"stage": stage, "inputs": inputs, "inputs_hash": hash_of(inputs), "versions": versions(), **more}


def score_model_stage(model: Path, corpus: Corpus, folder: Path, *, quiet: bool = False) -> float:
    """A model's held-out nats per token."""
    inputs = {"model": hash_model(model), "data": corpus.hash}
    if not is_done(folder, inputs):
        loaded = load_model(model).to(default_device())  # pyright: ignore[reportArgumentType]
        score = evaluate.evaluate(loaded, corpus.held_out, block=corpus.block, quiet=quiet)
        more = {"loss": score.loss, "bits_per_byte": score.bits_per_byte, "tokens": score.tokens}
        write_json(folder / LINEAGE, lineage_of("evaluate", inputs, model=str(model), **more))
    return read_json(folder / LINEAGE)["loss"]
