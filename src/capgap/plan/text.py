"""A plan in words and as a table."""

from typing import TYPE_CHECKING

from rich.table import Table

from capgap.cost import format_bytes, format_count, format_flops
from capgap.plan.estimate import FULL, H100_BYTES, H100_FLOPS, USED, Estimate

if TYPE_CHECKING:
    from capgap.plan.families import Member
    from capgap.plan.plan import Ask, Candidate, Plan
    from capgap.plan.second import SecondAsk


def plan_lines(plan: "Plan") -> list[str]:
    """The plan as plain lines: student, laws, teacher, start, cost, and what speaks against it."""
    lines = [f"student: {format_count(plan.student)} parameters"]
    for ask in plan.asks:
        lines += _law(ask)
    lines += _difference(plan)
    lines += _second(plan)
    lines.append(f"family: {plan.family.name}, sizes from {plan.family.source}")
    if plan.teacher is not None:
        lines.append(f"teacher: {plan.teacher.member.hub}, {_described(plan.teacher)}")
        if plan.teacher.member.note:
            lines.append(f"  note: {plan.teacher.member.note}")
        for where, other in (("below", plan.below), ("above", plan.above)):
            lines.append(f"  {where}: {f'{other.member.name}, {_described(other)}' if other else 'none'}")
        lines.append(f"  inside the interval: {_inside(plan)}")
        lines += _start(plan)
    if plan.cost is not None:
        lines += _cost(plan.cost, plan.tokens)
    return lines + [f"caution: {verdict.text}" for verdict in plan.verdicts]


def candidate_table(plan: "Plan") -> Table:
    """The members larger than the student, the teacher marked."""
    table = Table(title=f"{plan.family.name}: teachers of a {format_count(plan.student)} student")
    for name in ("member", "parameters", "ratio T/S", "cut", "in the interval", ""):
        table.add_column(name, justify="left" if name in ("member", "") else "right")
    for c in plan.candidates:
        inside = "-" if c.inside is None else "yes" if c.inside else "no"
        mark = "teacher" if c is plan.teacher else ""
        size = format_count(c.member.parameters)
        table.add_row(c.member.name, size, f"{c.ratio:.2f}", f"{c.sparsity:.0%}", inside, mark)
    return table


def _law(ask: "Ask") -> list[str]:
    interval = "no interval"
    if ask.low is not None and ask.high is not None:
        interval = f"interval {format_count(ask.low)} to {format_count(ask.high)}"
    size = format_count(ask.teacher)
    line = f"{ask.law}: a teacher of {size}, {ask.ratio:.2f} times the student ({interval})"
    return [line, *([f"  note: {ask.note}"] if ask.note else [])]


def _difference(plan: "Plan") -> list[str]:
    if len(plan.asks) < 2:
        return []
    own, published = plan.asks
    factor = f"yours asks for {own.teacher / published.teacher:.2f} times the published teacher"
    if own.pick is None or published.pick is None:
        return [f"the two laws: {factor}"]
    if own.pick is published.pick:
        return [f"the two laws: {factor}, and both pick {own.pick.name}"]
    return [
        (
            f"the two laws differ: {factor}, and picks {own.pick.name} where the published one picks "
            f"{published.pick.name}; yours decides here"
        )
    ]


def _second(plan: "Plan") -> list[str]:
    if plan.teacher is None:
        return []
    if plan.tokens is None:
        return ["second law: needs the tokens that you will distil on"]
    if not plan.second:
        return [f"second law: not asked, the tokens that {plan.family.name}'s members were trained on are not known"]
    return [line for ask in plan.second for line in _second_ask(ask, plan, plan.teacher.member)]


def _second_ask(ask: "SecondAsk", plan: "Plan", decided: "Member") -> list[str]:
    fitted, pick = ask.law.fitted, ask.pick
    under = [f"{p.member.name} {p.loss:.4f}" for p in ask.members]
    under += [f"{c.member.name} not known" for c in plan.candidates if c.member.trained_on is None]
    counted = f"{format_count(ask.parameters)} of the student's parameters, embeddings left out"
    if fitted.embeddings:
        counted = "all of the student's parameters"
    lines = [
        (
            f"{ask.name}: {pick.member.name}, under which a student from random weights is predicted to reach "
            f"{pick.loss:.4f} nats per token, {ask.alone:.4f} without a teacher (under each: {', '.join(under)})"
        ),
        (
            f"  note: {ask.law.source}; not of students cut from a model; fitted to students of "
            f"{' to '.join(map(format_count, fitted.students))}, own losses of teachers to "
            f"{format_count(fitted.teachers)}, and {format_count(fitted.tokens[1])} tokens; it counts {counted}"
        ),
    ]
    if ask.extrapolated:
        lines.append(f"  note: extrapolated: {'; '.join(ask.extrapolated)}")
    if decided is not pick.member:
        lines.append(_laws_differ(ask, decided))
    return lines


def _laws_differ(ask: "SecondAsk", decided: "Member") -> str:
    line = f"the laws differ: capacity gap picks {decided.name} and decides here, {ask.name} {ask.pick.member.name}"
    for p in ask.members:
        if p.member is decided:
            line += f" ({p.loss:.4f} and {ask.pick.loss:.4f} nats per token, as the latter predicts)"
    return line


def _described(candidate: "Candidate") -> str:
    size = format_count(candidate.member.parameters)
    return f"{size}, {candidate.ratio:.2f} times the student, {candidate.sparsity:.1%} to be cut"


def _inside(plan: "Plan") -> str:
    if plan.asks[0].low is None or plan.asks[0].high is None:
        return "not known, the law has no interval"
    return ", ".join(c.member.name for c in plan.candidates if c.inside) or "no member"


def _start(plan: "Plan") -> list[str]:
    if plan.teacher is None:
        return []
    lines = [f"start: {plan.teacher.member.hub}, the teacher itself, as in the paper"]
    if plan.near_start is not None:
        near, teacher = plan.near_start.member, plan.teacher.member
        lines.append(
            f"  or {near.hub}, {_described(plan.near_start)}: nearer, with the teacher unchanged; "
            "the paper did not test it; both share the tokenizer"
        )
        rows = [plan.family.vocabulary_of(m) for m in (near, teacher)]
        if rows[0] != rows[1]:
            lines.append(
                f"  note: {near.name} has {rows[0]} rows of vocabulary, {teacher.name} {rows[1]}: "
                "the difference is padding, to be cut before their logits are compared"
            )
    return lines + _apart(plan)


_EDGES = {-1: "at most ", 0: "", 1: "at least "}


def _apart(plan: "Plan") -> list[str]:
    """What the user's own runs say of a start and a teacher that are two models."""
    if (found := plan.apart) is None:
        return []
    law = found.law
    names = ("start", "teacher", "one for both")
    ratios = ", ".join(
        f"{name} {_EDGES[side]}{ratio.value:.2f} S"
        for name, ratio, side in zip(names, (law.start, law.teacher, law.coupled), law.sides, strict=True)
    )
    ratios += f"; at {law.budget}" if law.budget else ""
    if found.start is found.teacher:
        return [f"roles apart, by your own runs ({ratios}): {found.start.name} is the best for both"]
    return [
        (
            f"roles apart, by your own runs ({ratios}): cut from {found.start.hub}, taught by {found.teacher.hub}; in "
            f"them that gained {law.gain:.3f} nats per token over the best model for both, here {found.coupled.name}"
        ),
        (
            f"  cost: {found.dearer:.2f} times the FLOPs of {found.coupled.name} for both, and a second model to "
            "download; both share the tokenizer"
        ),
    ]


def _cost(cost: Estimate, tokens: int | None) -> list[str]:
    amount = tokens or 10**9
    memory = cost.memory
    fits = "fits one H100 of 80 GB"
    if memory.total > FULL * H100_BYTES:
        fits = "too much for one H100 of 80 GB: shard it, checkpoint activations, or cache the teacher"
    rate = f"{USED:.0%} of {H100_FLOPS / 1e12:.0f}e12 bfloat16 FLOPs a second"
    return [
        (
            f"cost of {format_count(amount)} tokens{'' if tokens else ' (no budget given)'}: "
            f"{format_flops(cost.flops(amount))}, three forward passes of the student and one of the teacher a "
            f"token; about {_hours(cost.gpu_hours(amount))} of one H100, assuming {rate}"
        ),
        (
            f"memory unsharded: {format_bytes(memory.total)} ({format_bytes(memory.teacher_weights)} of teacher "
            f"weights, {format_bytes(memory.activations)} of student activations) for one sequence of "
            f"{cost.context} tokens in bfloat16; {fits}"
        ),
        (f"  both estimated for a student of the teacher's depth, narrowed to {format_count(cost.student.total)}"),
    ]


def _hours(hours: float) -> str:
    return f"{hours:.2g} hours" if hours < 10 else f"{hours:,.0f} hours"
