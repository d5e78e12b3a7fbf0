"""Movement pruning: scores from explicit autograd, latent weights that come back, exact counts, resume to the bit."""

import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_disparse import DisparseTrainer, MovementConfig, MultitaskModel, UserError, decide, prunable_parameters
from hf_disparse.methods.movement import above_threshold, hard_step, soft_step
from hf_disparse.pruning.schedule import sparsity_at
from hf_disparse.trainer.checkpoints import PRUNING_STATE_NAME
from tests.helpers.resuming import STEPS, DieAt, Died, killed_and_resumed, slow
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer
from tests.helpers.training import Watch, arguments, assert_same, multitask_trainer, scheduled_zeros, weights

HARD = dict(sparsity=0.8, end_step=16, update_every=4)
SOFT = dict(mode="soft", score_learning_rate=0.5, penalty=4.0)


def test_hard_step_is_the_gradient_by_the_mask_times_minus_one():
    torch.manual_seed(0)
    latent, mask = torch.randn(5, 4), torch.rand(5, 4) > 0.5
    m = mask.float().requires_grad_()  # dL/dM = w dL/dw', for masked weights, too
    effective = latent * m
    effective.retain_grad()
    (torch.randn(3, 5) @ effective).tanh().square().sum().backward()
    score = torch.ones(5, 4)
    hard_step(score, latent * mask, effective.grad, latent * ~mask)
    torch.testing.assert_close(score, 1 - m.grad)


def test_soft_step_is_gradient_descent_on_the_loss_and_the_sigmoids():
    torch.manual_seed(0)
    score, movement = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    ((score * movement).sum() + 0.7 * torch.sigmoid(score).sum()).backward()
    stepped = score.detach().clone()
    soft_step(stepped, movement, 0.3, 0.7)
    torch.testing.assert_close(stepped, (score - 0.3 * score.grad).detach())


@pytest.mark.parametrize("quorum", [1, 2, 3])
def test_above_keeps_what_so_many_tasks_have_over_the_threshold(quorum):
    generator = np.random.default_rng(0)
    scores = {task: {"w": torch.tensor(generator.normal(size=(7, 5)))} for task in "abc"}
    over = sum((1 / (1 + np.exp(-s["w"].numpy())) > 0.4).astype(int) for s in scores.values())
    assert np.array_equal(above_threshold(scores, 0.4, quorum)["w"].numpy(), over >= quorum)


class After(TrainerCallback):
    def __init__(self, referee):
        self.referee = referee

    def on_step_end(self, args, state, control, *, model, **kwargs):
        referee = self.referee
        for name, p in prunable_parameters(model).items():
            referee.latent[name] = torch.where(referee.seen[name], p.detach(), referee.latent[name])


class Referee(DisparseTrainer):
    """Keeps latent weights and scores of its own: dL/dM by autograd of a model whose weights are w * M."""

    def begin(self):
        self.latent = {n: p.detach().clone() for n, p in prunable_parameters(self.model).items()}
        self.seen = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.latent.items()}
        self.scores, self.revived, self.changes = {}, 0, []
        self.add_callback(After(self))
        return self

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training and not self.pruner.method.over:
            self.look(model, dict(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def look(self, model, inputs):
        parameters = {n: p.detach() for n, p in prunable_parameters(model).items()}
        masks = self.pruner.masks or {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()}
        task = inputs["task"] if self.pruner.config.decision != "joint" else "joint"
        if any(not torch.equal(masks[n], self.seen[n]) for n in masks):
            self.changes.append((self.state.global_step, masks, {t: s.copy() for t, s in self.scores.items()}))
        for name, p in parameters.items():
            back = masks[name] & ~self.seen[name]
            self.revived += int(back.sum())
            assert torch.equal(p[back], self.latent[name][back]), "it came back as another"
            assert torch.equal(p == 0, ~masks[name])
        self.seen = masks
        for name, score in self.scores.get(task, {}).items():
            torch.testing.assert_close(score, self.pruner.method.buffers[task]["score"][name])
        gates = {n: mask.float().requires_grad_() for n, mask in masks.items()}
        before = torch.get_rng_state()  # the same dropout
        effective = {n: self.latent[n] * gates[n] for n in gates}
        loss = torch.func.functional_call(model, effective, kwargs=inputs).loss / self.args.gradient_accumulation_steps
        torch.set_rng_state(before)
        mine = self.scores.setdefault(task, {n: torch.zeros_like(g) for n, g in gates.items()})
        by_gate = torch.autograd.grad(loss, list(gates.values()))
        self.scores[task] = {n: mine[n] - g for n, g in zip(gates, by_gate, strict=True)}


@pytest.mark.parametrize("decision", ["unanimous", "joint"])
def test_scores_are_those_of_explicit_autograd_and_weights_come_back_as_they_went(tmp_path, decision):
    """Two batches, mostly of two tasks, in every step; weight decay is on."""
    config = MovementConfig(**HARD, decision=decision)
    trainer = Referee(
        tiny_model(),
        arguments(tmp_path, max_steps=18, gradient_accumulation_steps=2, learning_rate=1e-2),
        pruning_config=config,
        train_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    ).begin()
    trainer.train()
    assert set(trainer.scores) == ({"joint"} if decision == "joint" else {"two", "three", "real"})
    assert trainer.revived > 20
    assert [step for step, *_ in trainer.changes] == [4, 8, 12]  # at 16 the scores are gone
    for step, masks, scores in trainer.changes:
        expected = decide(scores, sparsity_at(config, step))
        same = sum(int((masks[n] == expected[n]).sum()) for n in masks)
        assert same >= 0.999 * sum(m.numel() for m in masks.values())  # but for the last bit of a sum


@pytest.mark.parametrize("decision", ["unanimous", "quorum", "joint", "mean_rank"])
def test_hard_mode_has_the_exact_count_at_every_update_and_in_the_file(tmp_path, decision):
    config = MovementConfig(**HARD, decision=decision, quorum=2 if decision == "quorum" else 1)
    watch = Watch()
    watch.trainer = trainer = multitask_trainer(tmp_path, config, callbacks=[watch], **STEPS)
    total = sum(p.numel() for p in prunable_parameters(trainer.model).values())
    trainer.train()
    expected = scheduled_zeros(config, total, steps=20)
    assert watch.zeros == expected
    assert expected[-1] == round(0.8 * total)
    assert all(watch.agree)
    assert trainer.pruner.method.buffers == trainer.pruner.method.held == {}, "memory is held for nothing"
    assert trainer.pruner.backward_passes == 0
    trainer.save_model()
    saved = prunable_parameters(MultitaskModel.from_pretrained(tmp_path))
    assert sum(int((p == 0).sum()) for p in saved.values()) == expected[-1]


def test_the_end_is_a_share_of_training_where_it_is_left_open(tmp_path):
    trainer = multitask_trainer(tmp_path, MovementConfig(sparsity=0.5, update_every=2), max_steps=10)
    trainer.train()
    assert list(trainer.pruner.method.steps) == [2, 4, 6]
    parameters = prunable_parameters(trainer.model).values()
    assert sum(int((p == 0).sum()) for p in parameters) == round(0.5 * sum(p.numel() for p in parameters))


@pytest.mark.parametrize("quorum", [1, 2])
def test_soft_mode_keeps_what_the_threshold_keeps_and_ends_in_the_exact_count(tmp_path, quorum):
    decision = "quorum" if quorum > 1 else "unanimous"
    config = MovementConfig(**HARD, **SOFT, decision=decision, quorum=quorum)
    seen = []

    class Look(TrainerCallback):
        """Runs before pruning, so that the scores of the update at this step are there."""

        def on_step_begin(self, args, state, control, *, model, **kwargs):
            method = trainer.pruner.method
            if state.global_step in method.steps:
                scores = [
                    torch.cat([score.flatten() for score in kinds["score"].values()])
                    for kinds in method.buffers.values()
                ]
                limit = math.log(config.threshold / (1 - config.threshold))
                seen.append(int((sum((s > limit).int() for s in scores) < quorum).sum()))

    watch = Watch()
    watch.trainer = trainer = multitask_trainer(tmp_path, config, callbacks=[Look(), watch], **STEPS)
    total = sum(p.numel() for p in prunable_parameters(trainer.model).values())
    trainer.train()
    zeros = [watch.zeros[step] for step in (4, 8, 12, 16)]
    assert zeros == [min(n, round(0.8 * total)) for n in seen[:3]] + [round(0.8 * total)]
    assert 0 < sorted(zeros)[1] < round(0.8 * total), "the threshold decided nothing"
    assert all(watch.agree)


def test_soft_scores_move_in_units_that_no_scale_of_the_loss_changes():
    class Spy:
        config = MovementConfig(**SOFT, end_step=9)

    from hf_disparse.methods.movement import Movement

    def run(scale):
        torch.manual_seed(0)
        method = Movement(Spy.config)
        parameters = {"w": torch.nn.Parameter(torch.randn(8, 8))}
        method.begin(parameters, ["a"], 10)
        for _ in range(3):
            method.gradient("w", parameters["w"].detach(), scale * torch.randn(8, 8), "a")
        return method.buffers["a"]["score"]["w"]

    torch.testing.assert_close(run(1.0), run(1e-7), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=["hard", *slow("soft")])
def undisturbed(request, tmp_path_factory):
    config = MovementConfig(**HARD, **(SOFT if request.param == "soft" else {}))
    trainer = multitask_trainer(tmp_path_factory.mktemp("whole"), config, **STEPS)
    trainer.train()
    return config, weights(trainer.model), trainer.pruner.masks


@pytest.mark.parametrize("step", [10, *slow(5, 8, 16, 19)])
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, undisturbed, step):
    config, expected, masks = undisturbed
    trainer = killed_and_resumed(tmp_path, config, step, **STEPS)
    assert_same(expected, weights(trainer.model))
    assert_same(masks, trainer.pruner.masks)


def test_a_checkpoint_without_scores_is_refused_before_the_last_update_alone(tmp_path):
    config = MovementConfig(**HARD)
    with pytest.raises(Died):
        multitask_trainer(tmp_path, config, callbacks=[DieAt(10)], **STEPS).train()
    for name in (PRUNING_STATE_NAME, "seal.json"):  # as another Trainer leaves it
        (tmp_path / "checkpoint-9" / name).unlink()
    with pytest.raises(UserError, match="the checkpoint does not hold the state of method movement"):
        multitask_trainer(tmp_path, config, **STEPS).train(resume_from_checkpoint=True)
    multitask_trainer(tmp_path / "late", config, **STEPS).train()
    assert not (tmp_path / "late" / "checkpoint-18" / PRUNING_STATE_NAME).exists()


def test_what_was_pruned_before_training_stays_so(tmp_path):
    model = tiny_model()
    torch.manual_seed(1)
    masks = {n: torch.rand(p.shape) > 0.3 for n, p in prunable_parameters(model).items()}
    trainer = multitask_trainer(tmp_path, MovementConfig(**HARD), model=model, masks=masks, max_steps=18)
    trainer.train()
    assert not any((trainer.pruner.masks[n] & ~masks[n]).any() for n in masks)
    pruned = sum(int((~m).sum()) for m in trainer.pruner.masks.values())
    assert pruned == round(0.8 * sum(m.numel() for m in masks.values()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decision": "sum"}, "decision: expected one of unanimous, quorum, joint, mean_rank with method movement"),
        (
            {"decision": "mean_rank", "mode": "soft"},
            "decision: expected one of unanimous, quorum, joint with mode soft",
        ),
        ({"mode": "medium"}, "mode: expected one of hard, soft, got 'medium'"),
        ({"mode": "soft", "threshold": 0.8}, r"threshold: expected a number in \(0, 0.73\)"),
        ({"mode": "soft", "penalty": 0}, "penalty: expected a number above 0, got 0"),
        ({"mode": "soft", "score_learning_rate": float("nan")}, "score_learning_rate: expected a number above 0"),
        ({"schedule": "one_shot"}, "schedule: expected one of cubic with method movement, got 'one_shot'"),
        ({"granularity": "head"}, "granularity: unknown value 'head' with method movement"),
        ({"criterion": "snip"}, "criterion: expected one of movement with method movement, got 'snip'"),
    ],
)
def test_what_does_not_go_together_is_refused_at_birth(values, words):
    with pytest.raises(UserError, match=words):
        MovementConfig(**values)


def test_fp16_is_refused(tmp_path):
    trainer = multitask_trainer(tmp_path, MovementConfig(**HARD), max_steps=18)
    trainer.args.fp16 = True
    with pytest.raises(UserError, match="movement reads raw gradients, which fp16 training scales; use bf16 instead"):
        trainer.pruner.check(trainer.model, trainer.args, 18)
