"""PLATON: the averages against numpy, buffers of each task, exact counts, resume to the bit."""

import numpy as np
import pytest
import torch

from hf_disparse import DisparseTrainer, MultitaskModel, PlatonConfig, UserError, decide, prunable_parameters
from hf_disparse.methods.platon import smooth, upper_confidence
from hf_disparse.pruning.schedule import sparsity_at
from tests.helpers.resuming import STEPS, killed_and_resumed
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer
from tests.helpers.training import Watch, arguments, assert_same, multitask_trainer, scheduled_zeros, weights

CUBIC = dict(sparsity=0.8, end_step=16, update_every=4)


def test_smooth_and_upper_confidence_are_the_formulas_in_numpy():
    generator = np.random.default_rng(0)
    importance, uncertainty = torch.zeros(4, 3), torch.zeros(4, 3)
    mean, spread = np.zeros((4, 3)), np.zeros((4, 3))
    for _ in range(5):
        w, g = generator.normal(size=(2, 4, 3))
        smooth(importance, uncertainty, torch.tensor(w).float(), torch.tensor(g).float(), 0.85, 0.95)
        now = np.abs(w * g)
        mean = 0.85 * mean + 0.15 * now
        spread = 0.95 * spread + 0.05 * np.abs(now - mean)
    np.testing.assert_allclose(upper_confidence(importance, uncertainty).numpy(), mean * spread, rtol=1e-4)


def test_smooth_takes_weights_in_bfloat16():
    importance, uncertainty = torch.zeros(4, 3), torch.zeros(4, 3)
    smooth(importance, uncertainty, torch.ones(4, 3).bfloat16(), torch.ones(4, 3).bfloat16(), 0.5, 0.5)
    assert torch.equal(upper_confidence(importance, uncertainty), torch.full((4, 3), 0.5 * 0.25))


class Referee(DisparseTrainer):
    """Smooths by itself, from gradients that autograd gives on a second pass with the same dropout."""

    seen: dict = {}
    changes: list = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training and not self.pruner.method.over:
            task = "joint" if self.pruner.config.decision == "joint" else inputs["task"]
            masks = self.pruner.masks
            if masks is not None and (not self.changes or self.changes[-1][1] is not masks):
                scores = {t: {n: mean * spread for n, (mean, spread) in s.items()} for t, s in self.seen.items()}
                self.changes.append((self.state.global_step, masks, scores))
            # Copies: the method looks at the gradients of the parameters themselves, whoever asks for them.
            parameters = {n: p.detach().clone().requires_grad_() for n, p in prunable_parameters(model).items()}
            before = torch.get_rng_state()
            loss = torch.func.functional_call(model, parameters, kwargs=dict(inputs)).loss
            loss = loss / self.args.gradient_accumulation_steps
            torch.set_rng_state(before)
            mine = self.seen.setdefault(task, {n: (torch.zeros_like(p),) * 2 for n, p in parameters.items()})
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                now = (p.detach() * g).abs()
                mean = 0.85 * mine[name][0] + 0.15 * now
                mine[name] = mean, 0.95 * mine[name][1] + 0.05 * (now - mean).abs()
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("decision", ["unanimous", "joint"])
def test_every_task_is_judged_by_its_own_batches(tmp_path, decision):
    """Two batches, mostly of two tasks, in every step; weight decay is on."""
    config = PlatonConfig(**CUBIC, decision=decision)
    trainer = Referee(
        tiny_model(),
        arguments(tmp_path, max_steps=18, gradient_accumulation_steps=2),
        pruning_config=config,
        train_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    )
    trainer.seen, trainer.changes = {}, []
    trainer.train()
    assert set(trainer.seen) == ({"joint"} if decision == "joint" else {"two", "three", "real"})
    assert [step for step, *_ in trainer.changes] == [4, 8, 12]  # at 16 the buffers are gone
    before = None
    for step, masks, scores in trainer.changes:
        expected = decide(scores, sparsity_at(config, step), active=before)
        same = sum(int((masks[n] == expected[n]).sum()) for n in masks)
        assert same >= 0.999 * sum(m.numel() for m in masks.values())  # but for the last bit of an average
        before = masks


@pytest.mark.parametrize("decision", ["unanimous", "quorum", "joint", "sum", "max", "mean_rank"])
def test_the_count_is_exact_at_every_update_and_in_the_file(tmp_path, decision):
    config = PlatonConfig(**CUBIC, decision=decision, quorum=2 if decision == "quorum" else 1)
    watch = Watch()
    watch.trainer = trainer = multitask_trainer(tmp_path, config, callbacks=[watch], **STEPS)
    total = sum(p.numel() for p in prunable_parameters(trainer.model).values())
    trainer.train()
    assert watch.zeros == scheduled_zeros(config, total, steps=20)
    assert all(watch.agree)
    assert trainer.pruner.method.buffers == {}, "memory is held for nothing"
    assert trainer.pruner.backward_passes == 0
    trainer.save_model()
    saved = prunable_parameters(MultitaskModel.from_pretrained(tmp_path))
    assert sum(int((p == 0).sum()) for p in saved.values()) == round(0.8 * total)


def test_a_task_without_a_batch_has_no_say_and_does_not_stop_a_quorum():
    from hf_disparse.methods.platon import Platon

    config = PlatonConfig(**CUBIC, decision="quorum", quorum=3)
    method = Platon(config)
    parameters = {"w": torch.nn.Parameter(torch.ones(4))}
    method.begin(parameters, ["a", "b", "c"], 20)
    method.gradient("w", parameters["w"].detach(), torch.tensor([1.0, 4, 3, 2]), "b")
    scores = {
        t: {"w": upper_confidence(k["importance"]["w"], k["uncertainty"]["w"])}
        for t, k in method.ordered_buffers().items()
    }
    masks = method.decide(scores, 0.5, {"w": torch.ones(4, dtype=torch.bool)})
    assert masks["w"].tolist() == [False, True, True, False]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = multitask_trainer(tmp_path_factory.mktemp("whole"), PlatonConfig(**CUBIC, decision="sum"), **STEPS)
    trainer.train()
    return weights(trainer.model), trainer.pruner.masks


@pytest.mark.parametrize("step", [5, 8, 10, 16, 19])
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, undisturbed, step):
    config = PlatonConfig(**CUBIC, decision="sum")
    trainer = killed_and_resumed(tmp_path, config, step, **STEPS)
    assert_same(undisturbed[0], weights(trainer.model))
    assert_same(undisturbed[1], trainer.pruner.masks)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beta1": 1.0}, r"beta1: expected a number in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"beta2: expected a number in \[0, 1\), got -0.1"),
        ({"schedule": "one_shot"}, "schedule: expected one of cubic with method platon, got 'one_shot'"),
        ({"granularity": "neuron"}, "granularity: unknown value 'neuron' with method platon"),
        ({"criterion": "snip"}, "criterion: expected one of platon with method platon, got 'snip'"),
    ],
)
def test_what_does_not_go_together_is_refused_at_birth(values, words):
    with pytest.raises(UserError, match=words):
        PlatonConfig(**values)


def test_the_config_is_found_again_by_its_method(tmp_path):
    config = PlatonConfig(**CUBIC, beta1=0.5)
    config.save_pretrained(tmp_path)
    assert PlatonConfig.from_pretrained(tmp_path) == config
