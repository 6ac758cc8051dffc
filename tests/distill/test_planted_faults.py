"""The checks can fail: each fault is planted, and the very check that stands against it is seen to catch it."""

import pytest
import torch

from capgap.data import Batches
from capgap.distill import Objective, fused
from capgap.distill.learner import Learner
from capgap.errors import ModelError
from capgap.models import load_model, save_model
from data import test_batches
from distill import test_invariance, test_objective
from tiny import ids, tiny_model

CAUGHT = (AssertionError, pytest.fail.Exception)


def test_a_loss_divided_by_the_tokens_of_its_part_is_caught(tmp_path, monkeypatch):
    own = Learner.learn

    def learn(self, input_BL, label_BL, targets, *, scored, last):
        own(self, input_BL, label_BL, targets, scored=float((label_BL >= 0).sum()), last=last)

    monkeypatch.setattr(Learner, "learn", learn)
    with pytest.raises(CAUGHT):
        test_invariance.check_accumulation(tmp_path)


def test_scored_padding_is_caught(tmp_path, monkeypatch):
    own = Objective.forward
    monkeypatch.setattr(
        Objective, "forward", lambda self, x, labels, targets=None: own(self, x, labels.abs() % 64, targets)
    )
    with pytest.raises(CAUGHT):
        test_objective.test_negative_labels_are_not_scored()
    with pytest.raises(CAUGHT):
        test_invariance.check_scored_tokens(tmp_path)


def test_a_divergence_that_is_not_zero_for_equal_models_is_caught(monkeypatch):
    """The cross-entropy with the teacher, which some call a KL: it has the gradient of one, but not its zero."""
    own = fused.chunk_loss

    def chunk_loss(logits, labels, chunk, mix, kd_weight, free):
        log_q = torch.log_softmax(chunk.logits_CV, -1)
        ce, kl, grad = own(logits, labels, chunk, mix, kd_weight, free)
        return ce, kl - (log_q.exp() * log_q).sum(), grad

    check = test_objective.test_divergence_of_equal_models_is_zero_with_its_gradient
    check("forward_kl", 1.0)
    monkeypatch.setattr(fused, "chunk_loss", chunk_loss)
    with pytest.raises(CAUGHT):
        check("forward_kl", 1.0)


def check_saved_whole(model, folder) -> None:
    """What is saved gives the same logits when it is loaded."""
    save_model(model, folder, tokenizer=None, lineage={})
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder)(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_saving_drops_is_caught(tied, tmp_path, monkeypatch):
    """Of a tied model the head is not written, and is there again; where it then is not, loading says so."""
    model = tiny_model(tied=tied)
    check_saved_whole(model, tmp_path / "sound")
    own = type(model).save_pretrained

    def save_without_head(self, folder, state_dict=None, **more):
        weights = {k: v for k, v in (state_dict or self.state_dict()).items() if k != "lm_head.weight"}
        self.config.tie_word_embeddings = False
        own(self, folder, state_dict=weights, **more)

    monkeypatch.setattr(type(model), "save_pretrained", save_without_head)
    with pytest.raises(ModelError, match=r"has no weight lm_head\.weight"):
        check_saved_whole(model, tmp_path / "faulty")


def test_a_teacher_in_train_mode_is_caught(monkeypatch):
    teacher = test_objective.family("gpt2", seed=2)
    test_objective.check_teacher_is_still(teacher)
    monkeypatch.setattr(teacher, "eval", lambda: teacher)
    with pytest.raises(CAUGHT):
        test_objective.check_teacher_is_still(teacher)


def test_an_order_that_depends_on_the_number_of_processes_is_caught(monkeypatch):
    check = test_batches.test_a_batch_is_a_pure_function_and_ranks_share_it.hypothesis.inner_test
    facts = {"weights": [1.0, 2.0], "rows": 6, "steps": [3, 0], "seed": 1, "world": 2}
    check(**facts)

    def samples(self, step, rank, world):  # dealt out like cards
        return range(step * self.blocks_per_step + rank, (step + 1) * self.blocks_per_step, world)

    monkeypatch.setattr(Batches, "_samples", samples)
    with pytest.raises(CAUGHT):
        check(**facts)
