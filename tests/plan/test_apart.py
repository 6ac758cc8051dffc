import pytest

from capgap.law import Estimate, RoleLaw
from capgap.plan import estimate, load_family, make_plan

LAW = RoleLaw(Estimate(1.4, 1.2, 1.6), Estimate(5.0, 4.0, 6.0), Estimate(2.7, 2.5, 3.0), 0.035, 2)


def test_start_and_teacher_are_the_members_nearest_to_each_roles_optimum():
    plan = make_plan(3_000_000_000, "qwen3", roles=LAW)
    assert plan.apart is not None
    assert (plan.apart.start.name, plan.apart.teacher.name, plan.apart.coupled.name) == ("4b", "14b", "8b")
    family = load_family("qwen3")
    costs = [
        estimate(3_000_000_000, family.config_of(family.member(name)), 4096).flops_per_token for name in ("14b", "8b")
    ]
    assert plan.apart.dearer == pytest.approx(costs[0] / costs[1])
    text = "\n".join(plan.lines())
    assert "cut from Qwen/Qwen3-4B-Base" in text or "cut from Qwen/Qwen3-4B" in text
    assert "gained 0.035 nats per token over the best model for both, here 8b" in text
    assert f"cost: {costs[0] / costs[1]:.2f} times the FLOPs of 8b" in text


def test_one_model_may_be_best_in_both_roles():
    same = RoleLaw(Estimate(1.4, None, None), Estimate(1.5, None, None), Estimate(1.4, None, None), 0.0, 1)
    plan = make_plan(3_000_000_000, "qwen3", roles=same)
    assert plan.apart is not None
    assert plan.apart.start is plan.apart.teacher
    assert any("4b is the best for both" in line for line in plan.lines())


def test_without_such_a_law_nothing_is_said():
    plan = make_plan(3_000_000_000, "qwen3")
    assert plan.apart is None
    assert not any("roles apart" in line for line in plan.lines())
    too_large = make_plan(500_000_000_000, "qwen3", roles=LAW)
    assert too_large.apart is None
