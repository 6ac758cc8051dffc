"""What a study is, and the trials that it is made of."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from transformers import LlamaConfig, PretrainedConfig

from capgap.anatomy import Shape
from capgap.cost import count_parameters, format_count
from capgap.errors import StudyError
from capgap.recipe import Count, Data, Evaluate, Prune, Section, Train


class Member(Section):
    """A nano Llama: its width, its peak learning rate."""

    hidden: Count
    neurons: Count
    lr: Annotated[float, Field(gt=0)]


class Nano(Section):
    """A family of small Llamas that the study pretrains itself, with a tokenizer trained on its own text."""

    vocabulary: Annotated[Count, Field(ge=300)] = 1024
    layers: Count = 2
    head_dim: Count = 16
    members: Annotated[list[Member], Field(min_length=1)]
    pretrain: Train

    def config(self, member: Member, block: int) -> PretrainedConfig:
        """The Hugging Face config of a member; one key-value head for each query head."""
        return self.config_of(
            Shape(self.layers, member.hidden, max(1, member.hidden // self.head_dim), member.neurons), block
        )

    def config_of(self, shape: Shape, block: int) -> PretrainedConfig:
        """The config of any shape of this family."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.neurons,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.kv_heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            max_position_embeddings=max(block, 128),
            bos_token_id=0,
            eos_token_id=0,
        )


class StudentShape(Section):
    """A student's shape, the same whatever it is cut from."""

    hidden: Count
    kv_heads: Count
    neurons: Count


class Roles(Section):
    """One trial outside the coupled grid: a student by its index, cut from one model, taught by another.

    `start` or `teacher` left out: random weights; cross-entropy alone.
    """

    student: Annotated[int, Field(ge=0)]
    start: str | None = None
    teacher: str | None = None


def _all_alike(prune: Prune) -> Prune:
    """Trials must differ in what is studied only: `auto`, which repairs some students and not others, repairs none."""
    return prune.model_copy(update={"repair": "none"}) if prune.repair == "auto" else prune


class StudySpec(Section):
    """A study: the family, the students, the seeds, and how they are trained.

    The coupled grid holds each student (of the first `grid_students`, if given) cut from, and taught by, each
    larger member, as in the paper. A worker trains up to `side_by_side` students of one teacher and seed in one
    pass of the teacher; each comes out as if trained alone.
    """

    data: Data
    nano: Nano
    students: Annotated[list[StudentShape], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default=[0])
    prune: Annotated[Prune, AfterValidator(_all_alike)] = Prune(repair="none")
    distill: Train
    evaluate: Evaluate = Evaluate()
    roles: list[Roles] = Field(default=[])
    grid_students: int | None = None
    side_by_side: Count = 1
    train_tokens: Count | None = None

    def member_names(self) -> dict[str, Member]:
        """The family, by names that tell the scale."""
        return {f"t{format_count(self.scale(self.nano.config(m, self.data.block)))}": m for m in self.nano.members}

    def student_name(self, index: int) -> str:
        return f"s{format_count(self.scale(self.student_config(index)))}"

    def student_config(self, index: int) -> PretrainedConfig:
        return self.nano.config_of(self.student_shape(index), self.data.block)

    def student_shape(self, index: int) -> Shape:
        student = self.students[index]
        return Shape(self.nano.layers, student.hidden, student.kv_heads, student.neurons)

    @staticmethod
    def scale(config: PretrainedConfig) -> int:
        return count_parameters(config).total


class Trial(Section):
    """One training run of a study.

    Attributes:
        name: unique in the study.
        kind: pretrain a member, distill a student, or train it from scratch without a teacher.
        member: of a pretrain trial; student: index, of the others.
        needs: names of the trials that must be done before.
    """

    name: str
    kind: Literal["pretrain", "distill", "scratch"]
    member: str | None = None
    student: int | None = None
    start: str | None = None
    teacher: str | None = None
    seed: int
    needs: list[str] = Field(default=[])


def trials_of(spec: StudySpec) -> list[Trial]:
    """All trials, each after what it needs: the members by falling cost, then the students by seed.

    Raises: StudyError where `roles` name a model that is not of the family, or a student that is not there.
    """
    members = spec.member_names()
    _check_roles(spec)
    scales = {name: spec.scale(spec.nano.config(member, spec.data.block)) for name, member in members.items()}
    seed = spec.nano.pretrain.seed
    trials = [
        Trial(name=name, kind="pretrain", member=name, seed=seed)
        for name in sorted(members, key=lambda name: -scales[name])
    ]
    for seed in spec.seeds:
        for index in range(len(spec.students))[: spec.grid_students]:
            shape, size = spec.student_shape(index), spec.scale(spec.student_config(index))
            for name in sorted(members, key=lambda name: -scales[name]):
                member = spec.nano.config(members[name], spec.data.block)
                fits = (
                    shape.hidden <= member.hidden_size
                    and shape.kv_heads <= member.num_key_value_heads
                    and shape.neurons <= member.intermediate_size
                )
                if fits and scales[name] > 1.05 * size:
                    trials.append(student_trial(spec, Roles(student=index, start=name, teacher=name), seed))
        trials += [student_trial(spec, roles, seed) for roles in spec.roles]
    return list({trial.name: trial for trial in trials}.values())


def _check_roles(spec: StudySpec) -> None:
    members = spec.member_names()
    for index, roles in enumerate(spec.roles):
        for key in ("start", "teacher"):
            name = getattr(roles, key)
            if name is not None and name not in members:
                raise StudyError(
                    f"roles.{index}.{key} = {name!r}: no member of the family; it has {', '.join(members)}"
                )
        if roles.student >= len(spec.students):
            raise StudyError(f"roles.{index}.student = {roles.student}: there are {len(spec.students)}, counted from 0")


def student_trial(spec: StudySpec, roles: Roles, seed: int) -> Trial:
    """The trial of one student in these roles."""
    name = f"{spec.student_name(roles.student)}-from-{roles.start or 'random'}-by-{roles.teacher or 'none'}-seed{seed}"
    return Trial(
        name=name,
        kind="distill" if roles.teacher else "scratch",
        student=roles.student,
        start=roles.start,
        teacher=roles.teacher,
        seed=seed,
        needs=sorted({n for n in (roles.start, roles.teacher) if n}),
    )
