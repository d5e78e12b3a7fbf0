"""L0 with hard-concrete gates: gates and Lagrangian against autograd, effective weights between steps, exact end."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_disparse import L0Config, MultitaskModel, UserError, prunable_parameters
from hf_disparse.methods.gates import (
    ascend,
    expected_gate,
    initial,
    lagrangian,
    logistic,
    open_probability,
    pull,
    sample,
    slope,
)
from hf_disparse.methods.l0 import L0
from hf_disparse.trainer.checkpoints import PRUNING_STATE_NAME
from tests.helpers.resuming import STEPS, DieAt, Died, killed_and_resumed
from tests.helpers.training import Watch, assert_same, multitask_trainer, weights

SHARE = dict(sparsity=0.8, start_step=2, end_step=14, gate_learning_rate=0.5)


def gate(log_alpha, u):
    """The paper's."""
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) * 1.5)
    return (s * 1.2 - 0.1).clamp(0, 1)


def test_gates_and_their_slopes_are_those_of_autograd():
    torch.manual_seed(0)
    log_alpha, u = torch.randn(500, dtype=torch.float64) * 3, torch.rand(500, dtype=torch.float64)
    log_alpha.requires_grad_()
    expected = gate(log_alpha, u)
    expected.sum().backward()
    z = sample(log_alpha.detach(), 1.5 * (u.log() - (1 - u).log()))
    torch.testing.assert_close(z, expected.detach())
    assert {0.0, 1.0} < set(z.tolist())
    torch.testing.assert_close(slope(z), log_alpha.grad)


def test_a_gate_is_open_as_often_as_its_probability_says():
    torch.manual_seed(0)
    for value in (-3.0, -1.0, 0.0, 2.0):
        z = sample(torch.full((200_000,), value), logistic(200_000, torch.Generator().manual_seed(0)))
        assert float((z > 0).float().mean()) == pytest.approx(float(open_probability(torch.tensor(value))), abs=5e-3)
    assert initial(0.05) == pytest.approx(np.log(0.95 / 0.05))
    assert float(expected_gate(torch.tensor(initial(0.05)))) == 1.0
    assert expected_gate(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_pull_and_ascent_are_the_derivatives_of_the_lagrangian():
    s, l1, l2 = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -0.7, 0.4))
    value = lagrangian(s, 0.5, (l1, l2))
    assert value.item() == pytest.approx(-0.7 * -0.2 + 0.4 * 0.04)
    value.backward()
    assert pull(0.3, 0.5, (-0.7, 0.4)) == pytest.approx(-s.grad.item())
    assert ascend(0.3, 0.5, (-0.7, 0.4), 0.1) == pytest.approx(
        (-0.7 + 0.1 * l1.grad.item(), 0.4 + 0.1 * l2.grad.item())
    )


def test_two_steps_of_two_batches_are_those_of_autograd_and_torch_optimizers():
    """The reference has w and log_alpha as leaves, u from the same seed, and the Lagrangian in its loss."""
    config = L0Config(sparsity=0.6, start_step=3, end_step=9, seed=5, drop_rate=0.4)
    torch.manual_seed(0)
    start = {"a": torch.randn(6, 4), "b": torch.randn(3, 6)}
    inputs = torch.randn(2, 2, 8, 4)  # steps, batches, rows, columns

    def loss(w, x):
        return (torch.tanh(x @ w["a"].T) @ w["b"].T).square().mean()

    parameters = {n: torch.nn.Parameter(w.clone()) for n, w in start.items()}
    method, sgd = L0(config), torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9, weight_decay=0.01)
    method.begin(parameters, ["x", "y"], 20)
    w = {n: t.clone().requires_grad_() for n, t in start.items()}
    alpha = {n: torch.full_like(t, np.log(0.6 / 0.4)).requires_grad_() for n, t in start.items()}
    reference = torch.optim.SGD(w.values(), lr=0.1, momentum=0.9, weight_decay=0.01)
    adam = torch.optim.Adam(alpha.values(), lr=0.1)
    pool = torch.rand(24 + 2**20, generator=torch.Generator().manual_seed(5))
    multipliers = torch.tensor([0.0, 100.0], requires_grad=True)
    for step, batches in zip((3, 4), inputs, strict=True):
        method.before_step(parameters, step)
        for x in batches:
            loss(parameters, x).backward()
        method.before_optimizer(parameters)
        sgd.step()
        method.after_optimizer(parameters, sgd)
        sgd.zero_grad()

        places = torch.randint(2**20, (2,), generator=torch.Generator().manual_seed(5 * 2**31 + step)).tolist()
        u = {n: pool[i : i + t.numel()].view_as(t) for i, (n, t) in zip(places, start.items(), strict=True)}
        z = {n: gate(alpha[n], u[n]) for n in start}
        sum(loss({n: w[n] * z[n] for n in w}, x) for x in batches).backward()
        size = sum(a.numel() for a in alpha.values())
        unit = (sum(a.grad.square().sum() for a in alpha.values()) / size).sqrt()
        for a in alpha.values():
            a.grad /= unit
        s = 1 - sum(torch.sigmoid(a - 2 / 3 * np.log(0.1 / 1.1)).sum() for a in alpha.values()) / size
        penalty = lagrangian(s, 0.6 * (step + 1 - 3) / 5, multipliers)  # risen after 5 of 6 steps
        up = torch.autograd.grad(penalty, multipliers, retain_graph=True)[0]
        (size * penalty).backward()  # in units of the gates' gradients, a constraint on the number of weights
        for optimizer in (reference, adam):
            optimizer.step()
            optimizer.zero_grad()
        multipliers = (multipliers.detach() + up).requires_grad_()
        for name in start:
            torch.testing.assert_close(method.gates.latent[name], w[name].detach())
            torch.testing.assert_close(method.gates.log_alpha[name], alpha[name].detach(), rtol=1e-4, atol=1e-5)
            open_share = (torch.sigmoid(alpha[name]) * 1.2 - 0.1).clamp(0, 1)
            torch.testing.assert_close(parameters[name].detach(), (w[name] * open_share).detach())
        assert method.gates.multipliers == pytest.approx(multipliers.tolist(), rel=1e-4)


class Effective(TrainerCallback):
    """Whether the weights are the latent ones times the gates without noise, whenever someone looks."""

    def __init__(self):
        self.trainer, self.steps, self.evaluated, self.latent = None, [], [], {}

    def check(self, model) -> bool:
        method = self.trainer.pruner.method
        for name, p in prunable_parameters(model).items() if method.gates.latent else ():
            s = torch.sigmoid(method.gates.log_alpha[name]) * 1.2 - 0.1
            torch.testing.assert_close(p.detach(), method.gates.latent[name] * s.clamp(0, 1))
            assert not torch.signbit(p[p == 0]).any()
        return bool(method.gates.latent)

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.steps.append(self.check(model))

    def on_evaluate(self, args, state, control, *, model, **kwargs):
        self.evaluated.append(self.check(model))


def test_between_steps_the_weights_are_the_effective_ones_and_the_end_is_exact(tmp_path):
    watch, effective = Watch(), Effective()
    more = dict(eval_strategy="steps", eval_steps=7)
    callbacks = [watch, effective]
    watch.trainer = effective.trainer = trainer = multitask_trainer(
        tmp_path, L0Config(**SHARE), callbacks=callbacks, **STEPS | more
    )
    total = sum(p.numel() for p in prunable_parameters(trainer.model).values())
    trainer.train()
    assert effective.steps == [False] * 2 + [True] * 12 + [False] * 6
    assert effective.evaluated == [True, True, False]
    assert watch.zeros[14:] == [round(0.8 * total)] * 6
    assert all(watch.agree)
    method = trainer.pruner.method
    assert method.gates.latent == method.gates.log_alpha == method.state() == {}, "memory is held for nothing"
    trainer.save_model()
    saved = prunable_parameters(MultitaskModel.from_pretrained(tmp_path))
    assert sum(int((p == 0).sum()) for p in saved.values()) == round(0.8 * total)


def test_at_the_end_the_largest_log_alphas_stay_with_their_gates(tmp_path):
    found = {}

    class Look(TrainerCallback):
        """Runs before pruning does."""

        def on_step_begin(self, args, state, control, *, model, **kwargs):
            if state.global_step == 14:
                method = trainer.pruner.method
                found["alpha"] = {n: a.clone() for n, a in method.gates.log_alpha.items()}
                found["weights"] = {n: p.detach().clone() for n, p in prunable_parameters(model).items()}

    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.add_callback(After())

    class After(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **kwargs):
            if state.global_step == 14:
                found["pruned"] = {n: p.detach().clone() for n, p in prunable_parameters(model).items()}

    trainer = multitask_trainer(tmp_path, L0Config(**SHARE), callbacks=[Look(), Stop()], **STEPS)
    trainer.train()
    alpha = torch.cat([a.flatten() for a in found["alpha"].values()])
    kept = torch.cat([(p != 0).flatten() for p in found["pruned"].values()])
    before = torch.cat([p.flatten() for p in found["weights"].values()])
    after = torch.cat([p.flatten() for p in found["pruned"].values()])
    assert alpha[kept].min() >= alpha[~kept].max()
    opened = kept & (torch.sigmoid(alpha) * 1.2 - 0.1 > 0.01)
    assert opened.sum() > 0.8 * kept.sum()
    assert torch.equal(before[opened], after[opened]), "the outputs change by more than what is pruned"


def test_the_lagrangian_brings_the_expected_sparsity_to_its_target(tmp_path):
    gaps = []

    class Gap(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gates = trainer.pruner.method.gates.log_alpha.values()
            if gates:
                s = 1 - float(torch.cat([open_probability(a).flatten() for a in gates]).mean())
                gaps.append(s - 0.7 * min(1, state.global_step / 64))

    config = L0Config(sparsity=0.7, end_step=80)
    trainer = multitask_trainer(tmp_path, config, callbacks=[Gap()], max_steps=81, learning_rate=1e-3)
    trainer.train()
    assert len(gaps) == 80
    assert max(abs(gap) for gap in gaps[40:]) < 0.15
    assert abs(gaps[-1]) < 0.06


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = multitask_trainer(tmp_path_factory.mktemp("whole"), L0Config(**SHARE), **STEPS | {"save_steps": 2})
    trainer.train()
    return weights(trainer.model), trainer.pruner.masks


# Checkpoints are at even steps: before the gates, when they open, within, right before the end, after it.
@pytest.mark.parametrize("step", [1, 2, 7, 11, 14, 17])
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, undisturbed, step):
    steps = STEPS | {"save_steps": 1 if step == 1 else 2}
    trainer = killed_and_resumed(tmp_path, L0Config(**SHARE), step, **steps)
    assert_same(undisturbed[0], weights(trainer.model))
    assert_same(undisturbed[1], trainer.pruner.masks)


def test_a_checkpoint_without_gates_is_refused(tmp_path):
    with pytest.raises(Died):
        multitask_trainer(tmp_path, L0Config(**SHARE), callbacks=[DieAt(10)], **STEPS).train()
    for name in (PRUNING_STATE_NAME, "seal.json"):  # as another Trainer leaves it
        (tmp_path / "checkpoint-9" / name).unlink()
    with pytest.raises(UserError, match="the checkpoint does not hold the state of method l0"):
        multitask_trainer(tmp_path, L0Config(**SHARE), **STEPS).train(resume_from_checkpoint=True)


def test_a_step_that_dies_leaves_the_weights_of_the_step_before(tmp_path):
    before = {}

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **kwargs):
            if state.global_step == 6:
                before.update(weights(model))
                for head in model.heads.values():
                    head.classifier.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    trainer = multitask_trainer(tmp_path, L0Config(**SHARE), callbacks=[Poison()], **STEPS)
    with pytest.raises(UserError, match="the weights have not changed in this step"):
        trainer.train()
    assert_same(before, weights(trainer.model))


def test_the_noise_leaves_the_global_generator_alone_and_follows_seed_and_step():
    def gates(seed, step):
        method, parameters = L0(L0Config(end_step=9, seed=seed)), {"w": torch.nn.Parameter(torch.ones(50))}
        method.begin(parameters, ["a"], 10)
        method.before_step(parameters, step)
        return parameters["w"].detach().clone()

    state = torch.get_rng_state()
    first = gates(0, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, gates(0, 4))
    assert not torch.equal(first, gates(0, 5))
    assert not torch.equal(first, gates(1, 4))


def test_what_was_pruned_before_training_stays_so(tmp_path):
    trainer = multitask_trainer(tmp_path, **STEPS | {"max_steps": 1})
    torch.manual_seed(1)
    masks = {n: torch.rand(p.shape) > 0.3 for n, p in prunable_parameters(trainer.model).items()}
    trainer = multitask_trainer(tmp_path, L0Config(**SHARE), model=trainer.model, masks=masks, **STEPS)
    trainer.train()
    assert not any((trainer.pruner.masks[n] & ~masks[n]).any() for n in masks)
    pruned = sum(int((~m).sum()) for m in trainer.pruner.masks.values())
    assert pruned == round(0.8 * sum(m.numel() for m in masks.values()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decision": "unanimous"}, "decision: expected one of joint with method l0, got 'unanimous'"),
        ({"schedule": "cubic"}, "schedule: expected one of linear with method l0, got 'cubic'"),
        ({"granularity": "head"}, "granularity: unknown value 'head' with method l0"),
        ({"drop_rate": 0}, r"drop_rate: expected a number in \(0, 1\), got 0"),
        ({"gate_learning_rate": 0}, "gate_learning_rate: expected a number above 0"),
        ({"multiplier_learning_rate": "1"}, "multiplier_learning_rate: expected a number above 0"),
        ({"max_drop": 1.0}, "max_drop: must not be set with schedule linear"),
    ],
)
def test_what_does_not_go_together_is_refused_at_birth(values, words):
    with pytest.raises(UserError, match=words):
        L0Config(**values)
