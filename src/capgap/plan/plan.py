"""From the student that is wanted to the teacher, the start, the cost, and what speaks against it."""

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from capgap.errors import RecipeError, ShapeError
from capgap.law import RoleLaw, SecondLaw, published_teacher
from capgap.plan.apart import Apart, Law, apart
from capgap.plan.estimate import Estimate, estimate
from capgap.plan.families import Family, Member, load_family, nearest
from capgap.plan.second import SecondAsk, second_asks
from capgap.plan.text import candidate_table, plan_lines
from capgap.plan.verdicts import Verdict, verdicts
from capgap.recipe import FamilyPick, ModelRef


@dataclass(frozen=True)
class Ask:
    """The teacher that a law asks for: scales in parameters, `low` and `high` None without an interval.

    `law` names the law: "published law" or "your own law". `pick` is the member it picks, if there is one.
    """

    law: str
    teacher: float
    ratio: float
    low: float | None
    high: float | None
    note: str
    pick: Member | None


@dataclass(frozen=True)
class Candidate:
    """A member larger than the student.

    Attributes:
        ratio: teacher / student.
        inside: whether it lies in the interval of the law that decides; None where that has no interval.
    """

    member: Member
    ratio: float
    inside: bool | None

    @property
    def sparsity(self) -> float:
        """The share of it that is cut to make the student: 1 - S/T."""
        return 1 - 1 / self.ratio


@dataclass(frozen=True)
class Plan:
    """A plan for one student in one family.

    Attributes:
        student: parameters.
        asks: the deciding law first: the user's own where there is one, then the published law.
        candidates: the members larger than the student, ascending.
        teacher: the candidate nearest to what the deciding law asks for, by |log T/T*|; None without one.
        near_start: the smallest candidate below the teacher: another model to cut the student from.
        apart: start and teacher as a law of roles picks them; None without one.
        tokens: the budget, or None.
        cost: of the teacher picked; None without a teacher.
        second: the second law's words, the user's own first; without tokens, or where the members' are not known, none.
        verdicts: what speaks against it.
    """

    student: int
    family: Family
    asks: tuple[Ask, ...]
    candidates: tuple[Candidate, ...]
    teacher: Candidate | None
    near_start: Candidate | None
    apart: Apart | None
    tokens: int | None
    cost: Estimate | None
    second: tuple[SecondAsk, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def start(self) -> Member | None:
        """The model the student is cut from: the teacher itself, as in the paper."""
        return self.teacher.member if self.teacher else None

    @property
    def below(self) -> Candidate | None:
        """The candidate next below the teacher."""
        return self._beside(-1)

    @property
    def above(self) -> Candidate | None:
        """The candidate next above the teacher."""
        return self._beside(1)

    def _beside(self, step: int) -> Candidate | None:
        if self.teacher is None:
            return None
        at = self.candidates.index(self.teacher) + step
        return self.candidates[at] if 0 <= at < len(self.candidates) else None

    def lines(self) -> list[str]:
        """The plan as plain lines of text."""
        return plan_lines(self)

    def __rich__(self) -> RenderableType:
        return Group(candidate_table(self), *map(Text, plan_lines(self)))


def make_plan(
    student_params: int,
    family: str | Family,
    *,
    tokens: int | None = None,
    law: Law | None = None,
    roles: RoleLaw | None = None,
    second: SecondLaw | None = None,
    context: int = 4096,
) -> Plan:
    """Plans the teacher of a student of `student_params` parameters among the members of a family.

    Args:
        tokens: the budget of distillation; None where it is open.
        law: a law of the user's own, which then decides; the published one is shown beside it.
        roles: a law of roles of the user's own: it picks a start and a teacher of its own.
        second: a second law of the user's own, shown before the published one; neither decides.
        context: tokens of a sequence; a member whose positions are fewer lowers it.
    Raises: RecipeError for an unknown family or a count that is not positive; LawError if the law given names
        no teacher; ShapeError for a context that is not positive.
    """
    if student_params < 1:
        raise RecipeError(f"student = {student_params} must be a positive count of parameters")
    if tokens is not None and tokens < 1:
        raise RecipeError(f"tokens = {tokens} must be a positive count, or be left out")
    if context < 1:
        raise ShapeError(f"context = {context} must be at least 1 token")
    if isinstance(family, str):
        family = load_family(family)
    asks = _asks(student_params, family, law)
    asked = asks[0]
    candidates = tuple(
        Candidate(m, m.parameters / student_params, _inside(m, asked)) for m in _larger(student_params, family)
    )
    teacher = next((c for c in candidates if c.member is asked.pick), None)
    cost = near = None
    told: tuple[SecondAsk, ...] = ()
    if teacher is not None:
        config = family.config_of(teacher.member)
        cost = estimate(student_params, config, min(context, config.max_position_embeddings))
        near = candidates[0] if candidates[0] is not teacher else None
        if tokens is not None:
            told = second_asks(student_params, cost.student, family, [c.member for c in candidates], tokens, second)
    against = verdicts(
        student_params,
        family,
        asked.teacher,
        asked.low,
        asked.pick,
        tokens,
        cost.student if cost else None,
        # A refit to small models does not warn of large ones; the published law is the last.
        next((ask for ask in told if not ask.extrapolated), told[-1] if told else None),
    )

    def flops_per_token(member: Member) -> float:
        config = family.config_of(member)
        return estimate(student_params, config, min(context, config.max_position_embeddings)).flops_per_token

    pair = apart(student_params, [c.member for c in candidates], roles, flops_per_token) if roles else None
    return Plan(student_params, family, asks, candidates, teacher, near, pair, tokens, cost, told, against)


def resolve(ref: ModelRef, student_params: int | None, *, law: Law | None = None) -> str:
    """The folder or hub id that a recipe's reference to a model stands for.

    Text stands for itself, a named member for its hub id, and "law" for the hub id of the member that the law
    (`law` if given, else the published one) picks for a student of `student_params` parameters.

    Raises: RecipeError if the family or its member is not known, if the law must pick but the student has no
        count of parameters, or if no member is larger than the student.
    """
    if not isinstance(ref, FamilyPick):
        return ref
    family = load_family(ref.family)
    if ref.pick != "law":
        return family.member(ref.pick).hub
    if student_params is None:
        raise RecipeError(
            f"family {family.name}, pick = 'law': the law needs the student's parameters; give student.scale "
            "as a count such as 3B, or name a member"
        )
    pick = _asks(student_params, family, law)[0].pick
    if pick is None:
        largest = family.members[-1]
        raise RecipeError(
            f"family {family.name}, pick = 'law': no member is larger than the student's {student_params} "
            f"parameters; the largest, {largest.name}, has {largest.parameters}"
        )
    return pick.hub


def _asks(student: int, family: Family, law: Law | None) -> tuple[Ask, ...]:
    asks = []
    if law is not None:
        own = law.predict(student)
        pick = _nearest(student, family, own.teacher)
        asks.append(Ask("your own law", own.teacher, own.ratio, own.low, own.high, own.note, pick))
    published = published_teacher(student)
    pick = _nearest(student, family, published.teacher)
    asks.append(
        Ask(
            "published law",
            published.teacher,
            published.ratio,
            published.low,
            published.high,
            published.note,
            pick,
        )
    )
    return tuple(asks)


def _larger(student: int, family: Family) -> list[Member]:
    return [m for m in family.members if m.parameters > student]


def _nearest(student: int, family: Family, asked: float) -> Member | None:
    larger = _larger(student, family)
    return nearest(larger, asked) if larger else None


def _inside(member: Member, asked: Ask) -> bool | None:
    if asked.low is None or asked.high is None:
        return None
    return asked.low <= member.parameters <= asked.high
