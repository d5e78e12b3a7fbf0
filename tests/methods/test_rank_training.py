"""Rank pruning in training, by scores and by FLOP's gates: the budget at every update, and the same bits after a kill."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, Trainer, TrainerCallback

from hf_disparse import (
    FlopConfig,
    PruningCallback,
    PruningConfig,
    RankConfig,
    UserError,
    compact,
    find_masks,
    prunable_parameters,
    sparsity_report,
)
from hf_disparse.methods.flop import Flop
from hf_disparse.model.low_rank import low_rank_modules
from tests.helpers.compacting import close, logits, same
from tests.helpers.resuming import DieAt, Died, killed_and_resumed, slow
from tests.helpers.tiny import DENSE, tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, arguments, assert_same, multitask_trainer, plain_model, weights

CUBIC = dict(schedule="cubic", start_step=1, end_step=13, update_every=3, score_batches=2)


# Training


class Watch(TrainerCallback):
    """After every step: what is saved of the dense matrices, and whether the masks say which numbers are zero."""

    def __init__(self):
        self.trainer, self.saved = None, []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        parameters, masks = prunable_parameters(model), self.trainer.pruner.masks
        self.saved.append(sparsity_report(model, model.encoder, parameters)["prunable"])
        assert not masks or all(torch.equal(p != 0, masks[n]) for n, p in parameters.items())


@pytest.mark.parametrize(
    ("criterion", "decision"),
    [("magnitude", "quorum"), ("disparse", "unanimous"), ("random", "max")],
)
def test_training_meets_the_budget_at_every_update(criterion, decision, tmp_path):
    config = RankConfig(
        sparsity=0.6, criterion=criterion, decision=decision, quorum=1 + (decision == "quorum"), **CUBIC
    )
    watch = Watch()
    watch.trainer = trainer = multitask_trainer(tmp_path, config, callbacks=[watch], max_steps=15)
    trainer.train()
    largest = (16 + 32) / DENSE
    assert watch.saved[:1] == [1 - 2 * 1.0 * (4 * 512 + 2 * 768) / DENSE], "full rank takes more than the matrices do"
    first = watch.saved[0]
    for update, step in enumerate((1, 4, 7, 10, 13)):
        share = 1 - (1 - max(step - 1, 0) / 12) ** 3
        target = 0.6 - (0.6 - first) * (1 - share)
        if update:
            assert target - 1e-3 <= watch.saved[step] < target + largest
    assert 0.6 - 1e-3 <= watch.saved[-1] < 0.6 + largest and watch.saved[13] == watch.saved[14]
    assert all(module.up.weight.any() for module in low_rank_modules(trainer.model).values())


STEPS = dict(max_steps=16, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = multitask_trainer(tmp_path_factory.mktemp("whole"), RankConfig(sparsity=0.6, **CUBIC), **STEPS)
    trainer.train()
    return weights(trainer.model), trainer.pruner.masks


@pytest.mark.parametrize("step", [3, 8, 14])
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(step, undisturbed, tmp_path):
    config = RankConfig(sparsity=0.6, **CUBIC)
    again = killed_and_resumed(tmp_path, config, step, **STEPS)
    assert_same(undisturbed[0], weights(again.model))
    assert_same(undisturbed[1], again.pruner.masks)


def test_a_trained_model_comes_back_and_is_pruned_further(tmp_path):
    trainer = multitask_trainer(tmp_path / "run", RankConfig(sparsity=0.5, score_batches=2), save_strategy="epoch")
    trainer.train()
    trainer.save_model(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model").eval()
    same(again, trainer.model.cpu().eval())
    masks = find_masks(prunable_parameters(again))
    second = multitask_trainer(tmp_path / "more", RankConfig(sparsity=0.7, score_batches=2), model=again, masks=masks)
    second.train()
    saved = sparsity_report(again, again.encoder, prunable_parameters(again))["prunable"]
    assert 0.7 - 1e-3 <= saved < 0.7 + 48 / DENSE
    assert all(not (p[~masks[n]] != 0).any() for n, p in prunable_parameters(again).items()), "what is gone stays so"


def test_a_foreign_trainer_is_made_ready_and_resumes_with_its_zeros(tmp_path):
    def trainer(*callbacks, **kwargs):
        rows = tokenized_rows(BINARY, 40)
        batches = [{"input_ids": torch.tensor([r["input_ids"]]), "labels": torch.tensor([r["labels"]])} for r in rows]
        pruner = PruningCallback(RankConfig(sparsity=0.6, **CUBIC | {"end_step": 7}), {"only": batches})
        args = arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=9)
        return Trainer(
            plain_model(),
            args,
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            callbacks=[pruner, *callbacks],
            **kwargs,
        )

    with pytest.raises(Died):
        trainer(DieAt(6)).train()
    again = trainer()
    again.train(resume_from_checkpoint=True)
    report = sparsity_report(again.model, again.model.bert, prunable_parameters(again.model))
    assert 0.6 - 1e-3 <= report["prunable"] < 0.6 + 48 / DENSE
    optimizer = torch.optim.AdamW(plain_model().parameters())
    with pytest.raises(UserError, match="the optimizer already holds the old ones; call factorise"):
        trainer(optimizers=(optimizer, None))


def test_models_of_later_trials_are_factorised_too(tmp_path):
    trainer = multitask_trainer(tmp_path, RankConfig(sparsity=0.6, score_batches=2))
    trainer.model_init = lambda: tiny_model()
    trainer.train()
    assert len(low_rank_modules(trainer.model)) == 12


def test_what_cannot_be_met_is_refused_before_a_matrix_is_touched(tmp_path):
    trainer = multitask_trainer(tmp_path, RankConfig(sparsity=0.95))
    most = 1 - 2 * (4 * 32 + 2 * 48) / DENSE
    message = f"at most {most:.3f}, because one component of each of the 12 matrices stays, got 0.95"
    with pytest.raises(UserError, match=message):
        trainer.pruner.check(trainer.model, trainer.args, max_steps=12)
    assert not low_rank_modules(trainer.model)
    with pytest.raises(UserError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"granularity": "weight"}, "granularity: unknown value 'weight' with method rank"),
        ({"criterion": "taylor"}, "criterion: expected one of .* with method rank"),
        ({"sparsity": 1.0}, r"sparsity: expected a number in \[0, 1\)"),
    ],
)
def test_a_config_that_makes_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        RankConfig(**values)
    with pytest.raises(UserError, match="granularity: unknown value 'rank' with method saliency"):
        PruningConfig(granularity="rank")


def test_a_config_comes_back_from_its_file(tmp_path):
    config = RankConfig(sparsity=0.6, target_modules=["query"])
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config


# FLOP


def test_gates_of_components_pull_the_numbers_to_the_target():
    """W = up diag(z) down: gradients of the factor, of the gates and of the Lagrangian over numbers, against autograd."""
    torch.manual_seed(0)
    parameters = {
        "a.up.weight": nn.Parameter(torch.randn(6, 3)),
        "a.down.weight": nn.Parameter(torch.randn(3, 4)),
        "b.up.weight": nn.Parameter(torch.randn(5, 2)),
        "b.down.weight": nn.Parameter(torch.randn(2, 9)),
    }
    method = Flop(FlopConfig(sparsity=0.5, end_step=10, drop_rate=0.4))
    method.begin(parameters, ("t",), 20)
    method.before_step(parameters, 0)
    ours = method.gates
    latent, log_alpha = dict(ours.latent), {n: a.clone() for n, a in ours.log_alpha.items()}
    z = {n: ours.drawn[n].clone() for n in latent}
    for name in latent:
        torch.testing.assert_close(parameters[name].detach(), latent[name] * z[name])
    generator = torch.Generator().manual_seed(0)
    targets = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    gates = {n: a.clone().requires_grad_() for n, a in log_alpha.items()}
    size = {"a.up.weight": 10, "b.up.weight": 14}
    noise = {n: torch.logit((z[n] + 0.1) / 1.2) / 1.5 - log_alpha[n] for n in z}  # of the gates that were not clamped
    inside = {n: (z[n] > 0) & (z[n] < 1) for n in z}
    drawn = {n: torch.where(inside[n], torch.sigmoid((a + noise[n]) * 1.5) * 1.2 - 0.1, z[n]) for n, a in gates.items()}
    loss = sum((targets[n] * latent[n].detach() * drawn[n]).sum() for n in drawn)
    for name, p in parameters.items():
        p.grad = targets[name].clone()
    ours.multipliers = (0.7, 0.3)
    ours._step_adam = lambda force, unit: ours.__dict__.update(force=force, unit=unit)
    method.before_optimizer(parameters)
    expected = dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(ours.drawn[name], gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parameters[name].grad, targets[name] * z[name])
    chance = {n: torch.sigmoid(a - 2 / 3 * np.log(0.1 / 1.1)) for n, a in gates.items()}
    sparsity = 1 - sum(size[n] * chance[n].sum() for n in chance) / (6 * 4 + 5 * 9)
    first = 1 - (3 * 10 + 2 * 14) / (6 * 4 + 5 * 9)
    gap = sparsity - (first + (0.5 - first) * 1 / 8)  # the target has risen after 8 of the 10 steps
    lagrangian = 0.7 * gap + 0.3 * gap**2
    mean = (3 * 10 + 2 * 14) / 5
    pulls = torch.autograd.grad(lagrangian, list(gates.values()))
    for name, gradient in zip(gates, pulls, strict=True):
        pulled = ours.log_alpha[name].grad * ours.force * mean / (6 * 4 + 5 * 9)
        torch.testing.assert_close(pulled, gradient, atol=1e-6, rtol=1e-4)
    assert ours.multipliers[0] == pytest.approx(0.7 + gap.item(), abs=1e-5)


def test_gates_end_in_the_budget_and_leave_no_trace(tmp_path):
    watch = Watch()
    config = FlopConfig(sparsity=0.6, end_step=9, gate_learning_rate=0.5)
    trainer = multitask_trainer(tmp_path, config, max_steps=12, save_strategy="steps", save_steps=6)
    watch.trainer = trainer
    trainer.add_callback(watch)
    trainer.train()
    assert all(0.6 - 1e-3 <= saved < 0.6 + 48 / DENSE for saved in watch.saved[9:])
    model = trainer.model.cpu().eval()
    masks = trainer.pruner.masks
    assert all(torch.equal(p != 0, masks[n]) for n, p in prunable_parameters(model).items())
    expected = logits(model)
    assert compact(model)["rank"][1] < 192
    close(logits(model), expected)
    assert (
        load_file(tmp_path / "checkpoint-6" / "pruning_state.safetensors")
        and not (tmp_path / "checkpoint-12" / "pruning_state.safetensors").exists()
    )


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    trainer = multitask_trainer(tmp_path_factory.mktemp("gated"), FlopConfig(sparsity=0.6, end_step=9), **STEPS)
    trainer.train()
    return weights(trainer.model), trainer.pruner.masks


@pytest.mark.parametrize("step", [8, *slow(3)])
def test_a_killed_run_with_gates_ends_in_the_same_bits(step, gated, tmp_path):
    config = FlopConfig(sparsity=0.6, end_step=9)
    again = killed_and_resumed(tmp_path, config, step, **STEPS)
    assert_same(gated[0], weights(again.model))
    assert_same(gated[1], again.pruner.masks)
