"""What a study will cost: counted as its trials are, less what is done."""

import pytest

from capgap.cost import distill_flops_per_token, flops_per_token
from capgap.study import Family, estimate_study, trials_of
from study.small import study
from study.test_queue import record

WSD = {"tokens_per_step": 512, "lr": 5e-3, "schedule": "wsd", "warmup": "1k"}


def test_tokens_and_flops_are_those_of_the_trials_without_what_is_taken_over():
    family = Family(study(tokens=["0.3x", "1x"], distill=WSD, grids=[{"teachers": ["t60.7k"]}]))
    cost = estimate_study(family, measure=False)
    assert cost.trials == {"pretrain": 2, "distill": 2}
    own = 4_608 + 14_848 - 7 * 512  # nine steps, of which seven serve both
    assert cost.tokens == 2 * 5_120 + own
    members = [model.config for model in family.models.values()]
    pretraining = sum(flops_per_token(config, 64).training for config in members) * 5_120
    assert cost.flops == pytest.approx(pretraining + own * distill_flops_per_token(family.config(0), members[1], 64))
    assert cost.hours is None
    assert "not measured" in cost.lines(1)[-1]


def test_what_is_done_costs_nothing():
    family = Family(study())
    everything = [record(trial.name) for trial in trials_of(family)]
    cost = estimate_study(family, everything)
    assert (cost.done, cost.tokens, cost.flops, cost.disk, cost.hours) == (4, 0, 0, 0, 0)
    some = estimate_study(family, everything[:2], measure=False)
    assert some.tokens == 2 * 5_120
    assert "2 of them done" in some.lines(1)[0]


def test_hours_are_shared_by_workers():
    cost = estimate_study(Family(study()))
    assert cost.hours is not None
    assert cost.hours > 0
    assert "if 4 workers are not in each other's way" in cost.lines(4)[-1]
