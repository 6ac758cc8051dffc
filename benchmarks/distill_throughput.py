"""How fast one optimiser step of distillation is, and how much memory it takes: capgap against two other ways.

- capgap: the Objective with clipping and fused AdamW, what capgap.distill.loop.train does in a step.
- plain: logits of both models in full, float32 log-softmax of both, (1 - a) CE + a KL, the same optimiser.
- TRL: trl.experimental.gkd's GKDTrainer on given text (lmbda 0), forward KL, its own training_step.

Every way has its own copy of the same student, and sees the same ids in the same precision. TRL scores no last
token of a row (it has no label for it), so it is given slightly less to do; its tokens are counted in full.

    python benchmarks/distill_throughput.py --precision float32 bf16 --rounds 7 --json results.json
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, PreTrainedModel

from _measure import (
    console,
    in_own_process,
    interleaved,
    machine,
    peak_bytes,
    print_table,
    ratios,
    spread,
    write_results,
)
from capgap.distill import Divergence, Mix, Objective, OnlineTeacher, Sums
from capgap.models import default_device, head, hidden_states, new_model

KD_WEIGHT = 0.5
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
WAYS = ("capgap", "plain", "trl")
NAMES = {"capgap": "capgap", "plain": "plain loop", "trl": "TRL GKD"}
LOSS_AGREES = {"float32": 1e-5, "bf16": 1e-3}
KL_AGREES = 0.01
SHARED = "one thread and its processor time instead of the clock's, where other programs never rest"
QUIET = "a measurement is taken again where other programs had more than this share of the processors"


@dataclass(frozen=True)
class Setup:
    """One setting: `tokens` of a step in rows of `length`; `layers` of the student."""

    vocabulary: int
    precision: str
    tokens: int
    length: int
    chunk_tokens: int | None
    tied: bool
    layers: int
    device: str

    def ids(self, number: int) -> Tensor:
        """Rows [B, length + 1] of one step."""
        draw = torch.Generator().manual_seed(number)
        shape = (self.tokens // self.length, self.length + 1)
        return torch.randint(self.vocabulary, shape, generator=draw).to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")


class Losses(NamedTuple):
    """Nats per token; `loss` is what was differentiated."""

    loss: float
    kl: float


class Way(NamedTuple):
    """`step`: one optimiser step on ids [B, L + 1]; `losses`: of the same ids, with the weights left alone."""

    step: Callable[[Tensor], float]
    losses: Callable[[Tensor], Losses]


def llama(setup: Setup, hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=setup.vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 27 // 10 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=setup.length + 1,
        tie_word_embeddings=setup.tied,
        use_cache=False,
    )


def models(setup: Setup) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student, and a teacher of twice its width and as many layers as make it about 2.5 times as large."""
    student = new_model(llama(setup, 160, setup.layers), seed=0)
    with torch.device("meta"):
        one, two = (new_model(llama(setup, 320, layers), seed=0).num_parameters() for layers in (1, 2))
    layers = max(1, round((2.5 * student.num_parameters() - one) / (two - one)) + 1)
    teacher = new_model(llama(setup, 320, layers), seed=1)
    student.to(setup.device).train()  # pyright: ignore[reportArgumentType]
    teacher.to(setup.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    return student, teacher


def adamw(student: nn.Module) -> torch.optim.AdamW:
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)


def clip_and_step(student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    float(nn.utils.clip_grad_norm_(student.parameters(), CLIP))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def capgap_way(setup: Setup) -> Way:
    student, teacher = models(setup)
    online = OnlineTeacher(teacher)
    objective = Objective(student, Mix(Divergence("forward_kl"), KD_WEIGHT, 1.0, setup.chunk_tokens))
    optimizer = adamw(student)

    def sums_of(ids: Tensor) -> Sums:
        input_BL, label_BL = ids[:, :-1], ids[:, 1:]
        return objective(input_BL, label_BL, online.targets(input_BL, torch.arange(len(ids))))

    def step(ids: Tensor) -> float:
        with setup.autocast():
            sums = sums_of(ids)
            (sums.loss / setup.tokens).backward()
        ce, _ = (torch.stack([sums.ce, sums.kl]) / setup.tokens).tolist()
        clip_and_step(student, optimizer)
        return ce

    def losses(ids: Tensor) -> Losses:
        with torch.no_grad(), setup.autocast():
            sums = sums_of(ids)
        count = int((ids[:, 1:] >= 0).sum())
        return Losses(float(sums.loss) / count, float(sums.kl) / count)

    return Way(step, losses)


def plain_way(setup: Setup) -> Way:
    student, teacher = models(setup)
    optimizer = adamw(student)

    def loss_and_kl(ids: Tensor) -> tuple[Tensor, Tensor]:
        input_BL, label_T = ids[:, :-1], ids[:, 1:].flatten()
        with setup.autocast():
            student_TV = student(input_BL).logits.flatten(0, 1)
            with torch.no_grad():
                teacher_TV = teacher(input_BL).logits.flatten(0, 1)
        log_p_TV = torch.log_softmax(student_TV.float(), dim=-1)
        log_q_TV = torch.log_softmax(teacher_TV.float(), dim=-1)
        kl = functional.kl_div(log_p_TV, log_q_TV, log_target=True, reduction="batchmean")
        return (1 - KD_WEIGHT) * functional.nll_loss(log_p_TV, label_T) + KD_WEIGHT * kl, kl

    def step(ids: Tensor) -> float:
        loss, _ = loss_and_kl(ids)
        loss.backward()
        clip_and_step(student, optimizer)
        return float(loss.detach())

    def losses(ids: Tensor) -> Losses:
        with torch.no_grad():
            return Losses(*(float(value) for value in loss_and_kl(ids)))

    return Way(step, losses)


def trl_way(setup: Setup) -> Way:
    """Raises ImportError without TRL."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = importlib.import_module("trl.experimental.gkd")
    student, teacher = models(setup)
    rows = setup.ids(0)[:, :-1].cpu().tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = gkd.GKDConfig(
            output_dir=tempfile.mkdtemp(prefix="distill-throughput-"),
            lmbda=0.0,
            beta=0.0,  # which is KL(teacher || student) in TRL; main() checks it
            temperature=1.0,
            seq_kd=False,
            per_device_train_batch_size=len(rows),
            max_steps=1_000_000,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            bf16=setup.precision == "bf16",
            tf32=None,
            use_cpu=setup.device == "cpu",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = gkd.GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=importlib.import_module("datasets").Dataset.from_dict({"input_ids": rows, "labels": rows}),
            data_collator=importlib.import_module("transformers").default_data_collator,
            processing_class=word_tokenizer(),
        )
    trainer.create_optimizer_and_scheduler(num_training_steps=arguments.max_steps)
    model, optimizer, scheduler = trainer.accelerator.prepare(student, trainer.optimizer, trainer.lr_scheduler)
    trainer.model_wrapped = model

    def inputs(ids: Tensor) -> dict[str, Tensor]:
        input_BL = ids[:, :-1]
        return {"input_ids": input_BL, "attention_mask": torch.ones_like(input_BL), "labels": input_BL}

    def step(ids: Tensor) -> float:
        loss = trainer.training_step(model, inputs(ids), num_items_in_batch=ids[:, 1:-1].numel())
        float(trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        return float(loss)

    def losses(ids: Tensor) -> Losses:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            kl = float(trainer.compute_loss(model, trainer._prepare_inputs(inputs(ids))))
        return Losses(kl, kl)

    return Way(step, losses)


def word_tokenizer() -> Any:
    """The smallest tokenizer a trainer takes; nothing here is ever text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


BUILDERS: dict[str, Callable[[Setup], Way]] = {"capgap": capgap_way, "plain": plain_way, "trl": trl_way}


def unavoidable_parts(setup: Setup) -> dict[str, Callable[[], Any]]:
    """What no way of distilling can leave out, each alone; the products of the heads write into memory that is there
    already. In bf16 these are timed in float32 too, since not every machine is faster in bf16."""
    student, teacher = models(setup)
    input_BL = setup.ids(0)[:, :-1]
    optimizer = adamw(student)
    backbone_parameters = [p for name, p in student.named_parameters() if not name.startswith("lm_head")]
    grad_BLH = torch.randn(*input_BL.shape, 160, device=setup.device)
    gradients = [torch.randn_like(p) for p in student.parameters()]

    def teacher_backbone() -> None:
        with torch.no_grad(), setup.autocast():
            hidden_states(teacher, input_BL)

    def student_backbone() -> None:
        with setup.autocast():
            hidden_BLH = hidden_states(student, input_BL)
        hidden_BLH.backward(grad_BLH.to(hidden_BLH.dtype))
        for parameter in backbone_parameters:
            parameter.grad = None

    def optimiser() -> None:
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            parameter.grad = gradient
        clip_and_step(student, optimizer)

    def heads(dtype: torch.dtype) -> Callable[[], None]:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype)

        weight_VH, teacher_VH = cast(head(student)[0]), cast(head(teacher)[0])
        hidden_TH = cast(torch.randn(setup.tokens, 160, device=setup.device))
        teacher_TH = cast(torch.randn(setup.tokens, 320, device=setup.device))
        logits_TV, out_TH, out_VH = hidden_TH @ weight_VH.T, torch.empty_like(hidden_TH), torch.empty_like(weight_VH)
        grad_TV = torch.randn_like(logits_TV)

        def products() -> None:
            torch.mm(teacher_TH, teacher_VH.T, out=logits_TV)
            torch.mm(hidden_TH, weight_VH.T, out=logits_TV)
            torch.mm(grad_TV, weight_VH, out=out_TH)
            torch.mm(grad_TV.T, hidden_TH, out=out_VH)

        return products

    parts: dict[str, Callable[[], Any]] = {
        "teacher backbone": teacher_backbone,
        "student backbone": student_backbone,
        "heads, float32": heads(torch.float32),
        "clip and AdamW": optimiser,
    }
    if setup.precision == "bf16":
        parts["heads, bf16"] = heads(torch.bfloat16)
    return parts


def sum_of_parts(parts: dict[str, list[float]]) -> list[float]:
    """Round by round, with the products of the heads in the faster precision."""
    heads = [list(seconds) for name, seconds in parts.items() if name.startswith("heads")]
    fastest = min(heads, key=lambda seconds: spread(seconds).median)
    rest = [seconds for name, seconds in parts.items() if not name.startswith("heads")]
    return [sum(row) for row in zip(fastest, *rest, strict=True)]


def check(setup: Setup, ways: dict[str, Way]) -> dict[str, dict[str, float]]:
    """The losses of the first batch. Raises SystemExit if the ways do not compute one thing."""
    ids = setup.ids(0)
    found = {name: way.losses(ids)._asdict() for name, way in ways.items() if name != "trl"}
    if "trl" in ways:
        unscored_last = torch.cat([ids[:, :-1], torch.full_like(ids[:, :1], -1)], dim=1)
        found["capgap, as TRL scores"] = ways["capgap"].losses(unscored_last)._asdict()
        found["trl"] = ways["trl"].losses(ids)._asdict()
        _agree("KL", found["trl"]["kl"], found["capgap, as TRL scores"]["kl"], KL_AGREES, "TRL")
    _agree("loss", found["plain"]["loss"], found["capgap"]["loss"], LOSS_AGREES[setup.precision], "the plain loop")
    return found


def _agree(what: str, theirs: float, ours: float, tolerance: float, whose: str) -> None:
    off = abs(theirs - ours) / abs(ours)
    if not off <= tolerance:
        raise SystemExit(f"the {what} of {whose} is {theirs:.6f}, capgap's {ours:.6f}: {off:.1e} apart")


def peak_of(name: str, setup: Setup) -> int | None:
    """Bytes that two steps of one way take above models, optimiser and its state."""
    with quiet():
        way = BUILDERS[name](setup)
        way.step(setup.ids(0)[:1, :9])  # AdamW makes its state in the first step
        return peak_bytes(lambda: [way.step(setup.ids(number)) for number in range(2)], torch.device(setup.device))


def repeated(way: Way, setup: Setup, steps: int) -> Callable[[], None]:
    """`steps` optimiser steps, each on other ids than the last."""
    batches = itertools.cycle([setup.ids(number) for number in range(4)])

    def run() -> None:
        for _ in range(steps):
            way.step(next(batches))

    return run


def measure(setup: Setup, names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way and part, and their ratios."""
    rounds, steps, shared = args.rounds, args.steps, args.shared_machine
    device = torch.device(setup.device)
    with quiet():
        ways = {name: BUILDERS[name](setup) for name in names}
    losses = check(setup, ways)
    parts = unavoidable_parts(setup)
    timed, disturbed = interleaved(
        {**{name: repeated(way, setup, steps) for name, way in ways.items()}, **parts},
        rounds,
        device,
        quiet_within=1.0 if shared else args.quiet_within,
        clock=time.process_time if shared else time.perf_counter,
        tell=lambda text: print(f"  {label(setup)}: {text}", file=sys.stderr, flush=True),
    )
    seconds = {name: [value / steps for value in timed[name]] for name in names}
    part_seconds = {name: timed[name] for name in parts}
    return {
        "losses": losses,
        "seconds": seconds,
        "part_seconds": part_seconds,
        "processor_time": shared,
        "disturbed": disturbed,
        "faster_than": {name: ratios(seconds[name], seconds["capgap"]) for name in names if name != "capgap"},
        "over_parts": {name: ratios(seconds[name], sum_of_parts(part_seconds)) for name in names},
    }


def label(setup: Setup) -> str:
    return f"vocabulary {setup.vocabulary:,}, {setup.precision}"


def report(setup: Setup, result: dict[str, Any]) -> None:
    memory = {
        name: "does not fit" if taken is None else f"{taken / 1e6:,.0f}"
        for name, taken in result.get("memory_bytes", {}).items()
    }
    columns, rows = ["way"], [[NAMES[name]] for name in WAYS if name in result.get("seconds", memory)]
    if "seconds" in result:
        columns += ["seconds a step", "tokens a second", "capgap is faster by"]
        for row, (name, seconds) in zip(rows, result["seconds"].items(), strict=True):
            middle = spread(seconds).median
            times = str(result["faster_than"][name]) if name != "capgap" else ""
            row += [f"{middle:.3f}", f"{setup.tokens / middle:,.0f}", times]
    if memory:
        columns.append("peak memory, MB")
        for row, taken in zip(rows, memory.values(), strict=True):
            row.append(taken)
    print_table(f"{label(setup)}, {setup.tokens:,} tokens a step in rows of {setup.length}", columns, rows)
    if "part_seconds" in result:
        parts = [[name, f"{spread(seconds).median:.3f}"] for name, seconds in result["part_seconds"].items()]
        parts.append(["sum, the faster heads", f"{spread(sum_of_parts(result['part_seconds'])).median:.3f}"])
        parts += [[f"{NAMES[name]} / sum", str(over)] for name, over in result["over_parts"].items()]
        print_table("Unavoidable parts", ["part", "seconds"], parts)
        if not result["processor_time"]:
            share = max(max(shares) for shares in result["disturbed"].values())
            console.print(f"Other programs took up to {share:.0%} of the processors; see `disturbed` in the JSON file.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Trainers greet on standard output; the table should stand alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", help="4096 32000 if not given")
    parser.add_argument("--precision", nargs="+", choices=["bf16", "float32"], default=["bf16"])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="of a row")
    parser.add_argument("--layers", type=int, default=9, help="of the student; the teacher's follow")
    parser.add_argument("--chunk-tokens", type=int, help="capgap's; it chooses for itself if not given")
    parser.add_argument("--tied", action="store_true", help="heads that share the embedding's weight")
    parser.add_argument("--rounds", type=int, default=5, help="kept; one more runs first")
    parser.add_argument("--steps", type=int, default=1, help="of a way in a round")
    parser.add_argument("--quiet-within", type=float, default=0.05, help=QUIET)
    parser.add_argument("--shared-machine", action="store_true", help=SHARED)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="capgap and plain always run")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-only", action="store_true", help="no timing")
    parser.add_argument("--quick", action="store_true", help="tiny: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    args = parser.parse_args(argv)
    args.vocabulary = args.vocabulary or ([4096] if args.quick else [4096, 32000])
    if args.quick:
        args.tokens, args.length, args.layers, args.rounds = 64, 32, 2, 1
    if args.tokens % args.length:
        parser.error(f"--tokens {args.tokens} is no multiple of --length {args.length}")
    args.ways = [name for name in WAYS if name in {"capgap", "plain", *args.ways}]
    if "trl" in args.ways and importlib.util.find_spec("trl") is None:
        console.print("TRL is not installed (it comes with capgap's extra `bench`), so it is left out.")
        args.ways.remove("trl")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints tables, writes the JSON file that was asked for."""
    args = settings(argv)
    device = default_device()
    if args.shared_machine:
        if device.type != "cpu":
            raise SystemExit("--shared-machine counts processor time, which says nothing of a GPU")
        torch.set_num_threads(1)
    results = []
    # All memory first: a child process starts out with its parent's peak.
    setups = [
        Setup(vocabulary, precision, args.tokens, args.length, args.chunk_tokens, args.tied, args.layers, device.type)
        for vocabulary, precision in itertools.product(args.vocabulary, args.precision)
    ]
    for setup in setups:
        result: dict[str, Any] = {"setup": asdict(setup)}
        if not args.no_memory:
            result["memory_bytes"] = {name: in_own_process(peak_of, name, setup) for name in args.ways}
        results.append(result)
    for setup, result in zip(setups, results, strict=True):
        if not args.memory_only:
            result.update(measure(setup, args.ways, args))
        report(setup, result)
    versions = {
        name: importlib.metadata.version(name) for name in ("transformers", *(w for w in args.ways if w == "trl"))
    }
    write_results(args.json, {"machine": machine(device) | versions, "results": results})


if __name__ == "__main__":
    main()
