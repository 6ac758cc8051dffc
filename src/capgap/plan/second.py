"""The second law in a plan: what the student, from random weights, is predicted to reach under each member."""

from collections.abc import Sequence
from dataclasses import dataclass

from capgap.cost import Parameters, count_parameters, format_count
from capgap.law import PUBLISHED_SECOND, SecondLaw
from capgap.plan.families import Family, Member


@dataclass(frozen=True)
class Predicted:
    """A member as the teacher: its parameters as the law counts them; its and the student's loss, nats per token."""

    member: Member
    parameters: int
    teacher_loss: float
    loss: float


@dataclass(frozen=True)
class SecondAsk:
    """What a second law says of one student and budget.

    Attributes:
        name: "your own second law" or "published second law".
        parameters: the student's, as the law counts them; with one teacher or another they are the same.
        tokens: that the student is trained on.
        alone: its predicted loss without a teacher, nats per token.
        members: those larger than the student whose tokens of pretraining are known, ascending.
        pick: the member under which the student's loss is lowest.
    """

    name: str
    law: SecondLaw
    parameters: int
    tokens: int
    alone: float
    members: tuple[Predicted, ...]
    pick: Predicted

    @property
    def gain(self) -> float:
        """By how much the picked teacher lowers the student's predicted loss, nats per token; negative if it harms."""
        return self.alone - self.pick.loss

    @property
    def extrapolated(self) -> list[str]:
        """What lies outside the runs that the law was fitted to, in words."""
        fitted, said = self.law.fitted, []
        fewest, most = fitted.tokens
        if not fitted.students[0] <= self.parameters <= fitted.students[1]:
            said.append(f"the student's {format_count(self.parameters)} parameters")
        if not fewest <= self.tokens <= most:
            said.append(f"its {format_count(self.tokens)} tokens")
        if large := [p.member.name for p in self.members if p.parameters > fitted.teachers]:
            said.append(f"the size of {', '.join(large)}")
        if long := sorted({p.member.trained_on or 0 for p in self.members if (p.member.trained_on or 0) > most}):
            said.append(f"the {' and '.join(map(format_count, long))} tokens of the teachers")
        return said


def second_asks(
    student: int, shape: Parameters, family: Family, members: Sequence[Member], tokens: int, own: SecondLaw | None
) -> tuple[SecondAsk, ...]:
    """What the user's own second law says, where there is one, then the published one; none if no tokens are known.

    Args:
        student: its parameters; `shape` is the one that its cost is estimated for. A law that leaves embeddings out
            takes those of the shape, so that they do not change with the teacher.
        members: the candidates.
    """
    known = [(m, m.trained_on) for m in members if m.trained_on is not None]
    laws = [("your own second law", own)] if own is not None else []
    asks = []
    for name, law in [*laws, ("published second law", PUBLISHED_SECOND)] if known else []:
        whole = law.fitted.embeddings
        n = student if whole else shape.non_embedding
        sizes = [m.parameters if whole else count_parameters(family.config_of(m)).non_embedding for m, _ in known]
        losses = [float(law.supervised.loss(size, d)) for size, (_, d) in zip(sizes, known, strict=True)]
        predicted = tuple(
            Predicted(m, size, loss, float(law.student_loss(loss, n, tokens)))
            for (m, _), size, loss in zip(known, sizes, losses, strict=True)
        )
        pick = predicted[law.best_teacher(losses, n, tokens)]
        asks.append(SecondAsk(name, law, n, tokens, float(law.supervised.loss(n, tokens)), predicted, pick))
    return tuple(asks)
