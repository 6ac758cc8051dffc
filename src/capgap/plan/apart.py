"""The two roles apart in a plan: which member to cut, which to learn from, what the second one gains and costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from capgap.law import Prediction, RoleLaw
from capgap.plan.families import Member, nearest


class Law(Protocol):
    """Whatever names a student's optimal teacher."""

    def predict(self, student: float) -> Prediction:
        """The optimal teacher of a student of `student` parameters."""
        ...


@dataclass(frozen=True)
class Apart:
    """The members that a law of roles picks for a student.

    Attributes:
        law: that of the user's study.
        start, teacher: the members nearest to P* and T*; coupled: that nearest to the best model for both.
        dearer: FLOPs of a token under the teacher over those under the one model for both.
    """

    law: RoleLaw
    start: Member
    teacher: Member
    coupled: Member
    dearer: float


def apart(
    student: int, members: Sequence[Member], law: RoleLaw, flops_per_token: Callable[[Member], float]
) -> Apart | None:
    """What the law picks among the members larger than the student; None where there is none.

    Args:
        flops_per_token: of training the student under a member.
    """
    if not members:
        return None
    start, teacher, coupled = (nearest(members, scale) for scale in law.predict(student))
    return Apart(law, start, teacher, coupled, flops_per_token(teacher) / flops_per_token(coupled))
