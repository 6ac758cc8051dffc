"""Models come in and go out as plain Hugging Face folders; here they are loaded, checked, saved and hashed."""

import hashlib
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from capgap.errors import ModelError
from capgap.files import LINEAGE, atomic_folder, hash_file, write_json

SHARD_BYTES = 5 * 10**9
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_folder(ref: str | Path) -> Path:
    """The local folder of a model: `ref` itself if it is a folder, else a download of the Hub model of that name.

    Raises: ModelError if it is neither.
    """
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{ref}: is a file; give the folder that holds config.json and the weights")
    if folder.is_absolute() or str(ref).startswith((".", "~")) or str(ref).count("/") > 1:
        raise ModelError(f"{ref}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(ref), allow_patterns=_HUB_FILES))
    except Exception as error:
        raise ModelError(
            f"{ref}: no such folder here, and the Hugging Face Hub did not give a model of that name "
            f"({type(error).__name__})"
        ) from None


def load_config(ref: str | Path) -> PretrainedConfig:
    """The model's config. Raises ModelError that names the folder."""
    folder = resolve_folder(ref)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds no config.json; a Hugging Face model folder has one")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'}: not a usable model config: {first_line(error)}") from None


def load_model(ref: str | Path, *, dtype: torch.dtype | Literal["auto"] = torch.float32) -> PreTrainedModel:
    """A causal language model, every weight present and finite.

    Args:
        dtype: `auto` for the checkpoint's own.
    Raises: ModelError that names the folder, and the file or weight that is missing, damaged or not finite.
    """
    folder = resolve_folder(ref)
    config = load_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: holds no *.safetensors; capgap reads weights in safetensors only")
    _check_shards(folder)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
            )
            model, info = loaded
    except Exception as error:
        raise ModelError(f"{folder}: the weights could not be loaded: {first_line(error)}") from None
    for kind, say in (("missing_keys", "has no weight"), ("mismatched_keys", "has a wrong shape for")):
        if info.get(kind):
            first = sorted(str(key) for key in info[kind])[0]
            raise ModelError(f"{folder}: {say} {first} ({len(info[kind])} in all); the checkpoint is incomplete")
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{folder}: weight {name} holds NaN or infinite values; the model is unusable")
    return model


def _check_shards(folder: Path) -> None:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: damaged or cut off ({first_line(error)}); fetch or save it again") from None


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class quiet_transformers:  # noqa: N801  (used as a context manager, like contextlib's own)
    """Keeps transformers' advice and progress bars out of the output of a block."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        self.warnings.__exit__(None, None, None)
        transformers_logging.set_verbosity(self.verbosity)
        if self.bar:
            transformers_logging.enable_progress_bar()


def new_model(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A float32 model with transformers' own random initial weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def bare_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config without any weights, on the meta device."""
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(config)


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: Any,
    lineage: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a plain Hugging Face folder with tokenizer and lineage, whole or not at all.

    Args:
        shard_bytes: no file of weights is larger, but for one that holds a single weight.
        weights: by name, where the model itself holds only shards of them.
    """
    with atomic_folder(folder) as beside:
        with quiet_transformers():
            model.save_pretrained(beside, state_dict=weights, max_shard_size=shard_bytes)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        write_json(beside / LINEAGE, lineage)


def hash_model(folder: Path) -> str:
    """SHA-256 over a model folder's config and weights; the tokenizer has a hash of its own.

    A file is read once in a process, for as long as its size and time of change stay the same.
    """
    digest = hashlib.sha256()
    for file in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        stat = file.stat()
        digest.update(f"{file.name}:{_hash_once(file.resolve(), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@cache
def _hash_once(file: Path, size: int, changed_ns: int) -> str:
    return hash_file(file)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model below its head: ids [B, L] to hidden states [B, L, H]."""
    return model.base_model


class Head(NamedTuple):
    """What turns hidden states into logits: cap * tanh(scale * (hidden @ weight.T + bias) / cap).

    Attributes:
        weight_VH, bias_V: the linear layer; the bias may be None.
        scale: of the logits, 1 for most models (Cohere's logit_scale, Granite's 1 / logits_scaling).
        cap: the final soft-cap of Gemma 2, or None.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_TH: Tensor, out_TV: Tensor | None = None) -> Tensor:
        """The logits [T, V] in float32; the products are taken in the hidden states' precision.

        Args:
            out_TV: float32, written to where the products give float32, so that no memory is taken anew.
        """
        weight = self.weight_VH.to(hidden_TH.dtype)
        if out_TV is not None and hidden_TH.dtype == torch.float32:
            logits = torch.mm(hidden_TH, weight.T, out=out_TV)
            logits = logits if self.bias_V is None else logits.add_(self.bias_V)
        else:
            bias = None if self.bias_V is None else self.bias_V.to(hidden_TH.dtype)
            logits = functional.linear(hidden_TH, weight, bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def head(model: PreTrainedModel) -> Head:
    """The model's head. Raises ModelError if it has none."""
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"{type(model).__name__} has no head that turns hidden states into logits")
    config: Any = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    weight, bias = cast(Tensor, output.weight), getattr(output, "bias", None)
    return Head(weight, bias, float(scale), None if cap is None else float(cap))


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises ModelError unless `head` of `hidden_states` gives the logits that the model itself gives."""
    training = model.training
    model.eval()
    input_BL = torch.arange(1, 5, device=model.device)[None] % model.config.get_text_config().vocab_size
    with quiet_transformers():
        own = model(input_ids=input_BL, use_cache=False).logits.float()
        found = head(model).logits(hidden_states(model, input_BL))
    model.train(training)
    if found.shape != own.shape or not torch.allclose(found, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise ModelError(
            f"{type(model).__name__} does something to its logits that capgap does not know; it cannot be distilled"
        )


def hidden_states(model: PreTrainedModel, input_BL: Tensor) -> Tensor:
    """The last hidden states [B, L, H], after the final norm, in the precision that the head is to multiply in."""
    hidden_BLH = backbone(model)(input_ids=input_BL, use_cache=False).last_hidden_state
    return in_head_precision(hidden_BLH)


def in_head_precision(hidden: Tensor) -> Tensor:
    """Under autocast its precision, as in the layers below; on CPUs that only emulate bfloat16, many times slower
    than float32, float32. Without autocast as it is."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden
    emulated = device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return hidden.to(torch.float32 if emulated else torch.get_autocast_dtype(device))


def sum_cross_entropy(
    model: PreTrainedModel, input_BL: Tensor, label_BL: Tensor, *, chunk_tokens: int = 1024
) -> Tensor:
    """Cross-entropy summed over all tokens, in nats; the full logits never exist, with gradients or without.

    Args:
        input_BL, label_BL: ids; label_BL[b, l] is the token that follows input_BL[b, l].
    Returns: scalar float32.
    """
    own_head = head(model)
    hidden_TH = hidden_states(model, input_BL).flatten(0, 1)

    def chunk_loss(hidden_CH: Tensor, label_C: Tensor) -> Tensor:
        return functional.cross_entropy(own_head.logits(hidden_CH), label_C, reduction="sum")

    total = hidden_TH.new_zeros((), dtype=torch.float32)
    chunks = zip(hidden_TH.split(chunk_tokens), label_BL.flatten().split(chunk_tokens), strict=True)
    for hidden_CH, label_C in chunks:
        if torch.is_grad_enabled():
            loss = checkpoint(chunk_loss, hidden_CH, label_C, use_reentrant=False)
            assert isinstance(loss, Tensor)
        else:
            loss = chunk_loss(hidden_CH, label_C)
        total = total + loss
    return total


def default_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
