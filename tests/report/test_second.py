"""The second law refit to records: which runs it takes, what it says, and why there is none."""

import math

import pytest

from capgap.errors import LawError
from capgap.law import PUBLISHED_SECOND, Alone, Taught
from capgap.report import second_law_of, second_lines, second_runs

from .made_up import by_second_law, from_random_weights, others, record, study, teachers


def test_runs_from_random_weights_and_their_teachers_losses_are_taken():
    records = [*study(seeds=1), *teachers(), *from_random_weights()]
    alone, taught = second_runs(records)
    assert len(alone) == 6
    assert len(taught) == 18
    assert alone[0] == Alone(58_000, 3_000_000, by_second_law(58_000, 3_000_000))
    assert Taught(260_000, 9_000_000, by_second_law(260_000, 9_000_000, 3.1), 3.1) in taught


def test_what_it_is_not_of_is_left_out():
    changed = [
        record("s58k", "t90k", start=None, condition="reverse-kl"),  # a condition of its own
        record("s58k", None, start=None, kind="scratch", condition="kd-only"),
        record("s58k", "t1.5M", start=None),  # whose own loss is not recorded
        record("s58k", "t90k", start=None, data_hash="ef" * 32),  # on other text than its teacher's loss
        record("s58k", None, start="t90k", kind="scratch"),  # cut, then trained without a teacher
        record("s58k", "t90k"),
    ]
    assert second_runs([*teachers(), *changed]) == ([], [])
    assert second_law_of([*study(), *teachers(), *changed]) is None
    assert second_lines(study()) == []


def test_a_refit_to_runs_of_the_published_law_returns_what_that_predicts():
    fit = second_law_of([*study(seeds=1), *teachers(), *from_random_weights()])
    assert fit is not None
    assert fit.runs == (6, 18)
    assert max(fit.error) < 1e-3
    assert fit.law.fitted.embeddings
    assert fit.law.fitted.students == (58_000, 260_000)
    assert fit.law.fitted.tokens == (3e6, 9e6)
    assert float(fit.law.student_loss(3.6, 120_000, 6e6)) == pytest.approx(by_second_law(120_000, 6e6, 3.6), rel=1e-3)


def test_lines_hold_coefficients_errors_and_runs():
    records = [*teachers(), *from_random_weights(1.1)]
    fit = second_law_of(records)
    assert fit is not None
    text = "\n".join(second_lines(records))
    assert "students of 58k to 260k parameters (embeddings included) from random weights" in text
    assert "refit to 6 runs without a teacher and 18 under one" in text
    for part, published in (
        (fit.law.supervised, PUBLISHED_SECOND.supervised),
        (fit.law.distillation, PUBLISHED_SECOND.distillation),
    ):
        for name in part.__dataclass_fields__:
            assert f"{name} {getattr(part, name):.4g} ({getattr(published, name):.4g})" in text
    for error in fit.error:
        assert f"rms error {error:.4f} nats per token" in text
    losses = [
        r.loss - float(fit.law.supervised.loss(r.student_scale, r.tokens)) for r in records if r.kind == "scratch"
    ]
    assert fit.error[0] == pytest.approx(math.sqrt(sum(e * e for e in losses) / 6))


def test_too_few_runs_or_several_sets_of_data_are_said_in_one_line():
    (line,) = second_lines([*study(), *others()])
    assert line == (
        "the second law is not refit: of runs from random weights there are 2 without a teacher and 0 under one whose "
        "own loss is recorded; it needs 6 and 9"
    )
    elsewhere = record("s58k", None, start=None, kind="scratch", data_hash="ef" * 32)
    with pytest.raises(LawError, match="are on 2 sets of data"):
        second_law_of([*teachers(), *from_random_weights(), elsewhere])
