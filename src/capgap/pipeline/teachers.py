"""Who teaches: one model, or a mixture of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from capgap import distill
from capgap.cost import count_parameters, flops_per_token
from capgap.data import check_same_tokenizer, load_tokenizer
from capgap.errors import ModelError
from capgap.files import hash_file, hash_of
from capgap.models import check_head, hash_model, load_config, load_model
from capgap.pipeline.stages import Corpus
from capgap.recipe import Train


@dataclass(frozen=True)
class Teachers:
    """Model folders, and the weight of each in the mixture of their distributions.

    Attributes:
        names: for the record; the folders' if there are none.
    """

    folders: tuple[Path, ...]
    weights: tuple[float, ...] = (1.0,)
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The one name, or such as `0.7 big + 0.3 small`."""
        names = self.names or tuple(str(folder) for folder in self.folders)
        if len(names) == 1:
            return names[0]
        return " + ".join(f"{w / sum(self.weights):.3g} {n}" for w, n in zip(self.weights, names, strict=True))

    @property
    def scale(self) -> int | None:
        """Parameters; None of a mixture, which has no scale of its own."""
        return count_parameters(self.configs[0]).total if len(self.configs) == 1 else None

    @cached_property
    def configs(self) -> list[PretrainedConfig]:
        return [load_config(folder) for folder in self.folders]

    @cached_property
    def hash(self) -> str:
        """Changes with any weight of any model, and with the mixture."""
        return self._hash_of([hash_model(folder) for folder in self.folders])

    def _hash_of(self, hashes: Sequence[str]) -> str:
        total = sum(self.weights)
        return hashes[0] if len(hashes) == 1 else hash_of([list(hashes), [w / total for w in self.weights]])

    def forward_flops(self, context: int) -> float:
        """Of one token, all models together."""
        return sum(flops_per_token(config, context).forward for config in self.configs)

    def check(self, corpus: Corpus) -> None:
        """Raises ModelError unless all know the text's tokens; rows past the tokenizer's may be there or not."""
        for folder, config in zip(self.folders, self.configs, strict=True):
            if config.vocab_size < corpus.train.vocab_size:
                raise ModelError(
                    f"the teacher {folder} has {config.vocab_size} tokens in its vocabulary, the tokenizer of the "
                    f"text {corpus.train.vocab_size}; take a teacher that knows all of them"
                )
            check_same_tokenizer(load_tokenizer(folder), corpus.tokenizer, str(folder), "the student")

    def load(self) -> list[PreTrainedModel]:
        """The models. Raises ModelError if capgap cannot make the logits of one itself."""
        models = [load_model(folder) for folder in self.folders]
        for model in models:
            check_head(model)
        return models

    def open_cache(self, cache: Path, corpus: Corpus, settings: Train) -> distill.CachedTeacher:
        """Opens what they said of this text. Raises CacheError if it was another's word, or of another text."""
        return distill.CachedTeacher.open(cache, self.cache_facts(corpus, settings))

    def cache_facts(self, corpus: Corpus, settings: Train) -> dict[str, Any]:
        """What a cache must have been made from to serve a training.

        Without the teacher's hash where a folder has no weights: a cache serves without them.
        """
        facts = {
            "teacher_config": self._hash_of([hash_file(folder / "config.json") for folder in self.folders]),
            "tokenizer": corpus.train.tokenizer_hash,
            "data": corpus.train.manifest_hash,
            "block": corpus.block,
            "temperature": settings.temperature,
        }
        whole = all(any(folder.glob("*.safetensors")) for folder in self.folders)
        return facts | ({"teacher": self.hash} if whole else {})
