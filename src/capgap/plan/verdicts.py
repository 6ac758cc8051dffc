"""When not to distil, or not yet: what speaks against a plan."""

from dataclasses import dataclass
from typing import Literal

from capgap.cost import Parameters, format_count
from capgap.plan.families import Family, Member
from capgap.plan.second import SecondAsk

Key = Literal[
    "no-teacher",
    "family-too-small",
    "family-too-large",
    "gap",
    "deep-cut",
    "same-size",
    "few-tokens",
    "no-gain",
    "vocabulary",
]

FAR = 1.5
DEEP = 0.8
SAME = 0.15
FEW_TOKENS = 5.0


@dataclass(frozen=True)
class Verdict:
    """One thing that speaks against the plan, and what to do about it; `key` names its kind."""

    key: Key
    text: str


def verdicts(
    student: int,
    family: Family,
    asked: float,
    low: float | None,
    teacher: Member | None,
    tokens: int | None,
    shape: Parameters | None,
    second: SecondAsk | None,
) -> tuple[Verdict, ...]:
    """All that speaks against distilling `student` parameters from `teacher`, in the order to read it.

    Args:
        asked, low: the teacher's scale by the law and the lower end of its interval, parameters.
        shape: the parameters of the student's estimated shape.
        second: what the second law says, where it was asked.
    """
    found = [
        _range(student, family, asked, low, teacher),
        _deep(student, teacher),
        _same(student, family),
        _tokens(student, tokens),
        _gain(second),
        _vocabulary(student, family, shape),
    ]
    return tuple(verdict for verdict in found if verdict is not None)


def _range(student: int, family: Family, asked: float, low: float | None, teacher: Member | None) -> Verdict | None:
    smallest, largest = family.members[0], family.members[-1]
    wanted = f"the {format_count(asked)} that the law asks for"
    if teacher is None:
        return Verdict(
            "no-teacher",
            (
                f"no teacher: no member of {family.name} is larger than the student ({format_count(student)}), "
                f"the largest is {_sized(largest)}; choose a larger family or a smaller student"
            ),
        )
    if largest.parameters < (asked if low is None else low):
        return Verdict(
            "family-too-small",
            (
                f"{family.name} ends at {_sized(largest)}, below {wanted}; expect less than a well-matched "
                "teacher would give, or look for a larger family"
            ),
        )
    share = teacher.parameters / asked
    if teacher is smallest and share > FAR:
        return Verdict(
            "family-too-large",
            (
                f"{family.name} begins at {_sized(smallest)}, {share:.1f} times {wanted}; a family with smaller "
                "members fits better"
            ),
        )
    if not 1 / FAR <= share <= FAR:
        return Verdict(
            "gap",
            (
                f"{family.name} has no member near {wanted}; the nearest that is larger than the student, "
                f"{_sized(teacher)}, is {share:.2f} times that, where the law says little"
            ),
        )
    return None


def _deep(student: int, teacher: Member | None) -> Verdict | None:
    if teacher is None or (cut := 1 - student / teacher.parameters) <= DEEP:
        return None
    return Verdict(
        "deep-cut",
        (
            f"{cut:.0%} of {teacher.name} would be cut; above {DEEP:.0%} expect much of what it knows to be "
            "lost: cut in steps, distilling after each, or start from a smaller model"
        ),
    )


def _same(student: int, family: Family) -> Verdict | None:
    near = [m for m in family.members if abs(m.parameters / student - 1) <= SAME]
    if not near:
        return None
    names = " and ".join(_sized(m) for m in near)
    return Verdict(
        "same-size",
        (
            f"{names} already {'has' if len(near) == 1 else 'have'} about the student's size: compare with that "
            "first; unless the distilled student beats it, distilling was not worth its cost"
        ),
    )


def _tokens(student: int, tokens: int | None) -> Verdict | None:
    if tokens is None or tokens >= FEW_TOKENS * student:
        return None
    return Verdict(
        "few-tokens",
        (
            f"{format_count(tokens)} tokens are {tokens / student:.2g} a student parameter, fewer than "
            f"{FEW_TOKENS:g}: the budget shifts the optimum, and with so few the teacher nearest to the student "
            "tends to win; take the pick as uncertain and compare its neighbours in short runs"
        ),
    )


def _gain(second: SecondAsk | None) -> Verdict | None:
    if second is None or second.gain > 0:
        return None
    return Verdict(
        "no-gain",
        (
            f"{second.name}: at {format_count(second.tokens)} tokens no teacher here helps a student from random "
            f"weights ({second.pick.loss:.4f} nats per token under {second.pick.member.name}, {second.alone:.4f} "
            "without one); compare with training alone"
        ),
    )


def _vocabulary(student: int, family: Family, shape: Parameters | None) -> Verdict | None:
    if shape is None or shape.embedding <= student / 2:
        return None
    tables, size = format_count(shape.embedding), format_count(student)
    reach = ""
    if shape.total > 1.1 * student:
        reach = f"; narrowing alone ends at {format_count(shape.total)}, so layers must go too"
    return Verdict(
        "vocabulary",
        (
            f"the vocabulary's tables would take {tables} of the student's {size} parameters in {family.name}; "
            f"a smaller vocabulary fits it better{reach}"
        ),
    )


def _sized(member: Member) -> str:
    return f"{member.name} ({format_count(member.parameters)})"
