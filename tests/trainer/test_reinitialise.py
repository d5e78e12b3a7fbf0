"""Re-initialise and retrain: the masks stay, the encoder's weights are those of a fresh one."""

import dataclasses

import pytest
import torch

from hf_disparse import DynamicConfig, MultitaskConfig, MultitaskModel, PruningConfig, UserError, prunable_parameters
from hf_disparse.trainer.reinitialise import reinitialise
from tests.helpers.resuming import STEPS, killed_and_resumed, slow
from tests.helpers.tiny import CONFIGS, three_tasks, tiny_model
from tests.helpers.training import StateAt, Watch, assert_same, multitask_trainer, weights

CUBIC = PruningConfig(
    sparsity=0.8, schedule="cubic", start_step=1, end_step=9, update_every=4, score_batches=1, reinitialise=True
)


def run(folder, config, *steps, **changes):
    watch, at = Watch(), StateAt(*steps)
    watch.trainer = trainer = multitask_trainer(folder, config, callbacks=[watch], **changes)
    trainer.add_callback(at)
    trainer.train()
    return trainer, watch, at


def test_the_encoder_is_drawn_anew_after_the_last_update_within_the_mask(tmp_path):
    trainer, watch, at = run(tmp_path, CUBIC, 5, 9, 10, max_steps=14)
    plain = run(tmp_path, dataclasses.replace(CUBIC, reinitialise=False), 5, 9, max_steps=14)
    _, _, without = plain
    assert_same(at.weights[5], without.weights[5])
    assert torch.equal(at.random[9], without.random[9]), "the global generator is where it was"
    masks = trainer.pruner.masks
    assert_same(masks, plain[0].pruner.masks)
    fresh = tiny_model()
    reinitialise(fresh.encoder, CUBIC.seed)
    for name, tensor in fresh.state_dict().items():
        got = at.weights[9][name]
        if name in masks:
            assert torch.equal(got, tensor * masks[name]), name
        elif name.startswith("encoder."):
            assert torch.equal(got, tensor), name
        else:
            assert torch.equal(got, without.weights[9][name]), "heads go on"
    size = sum(m.numel() for m in masks.values())
    assert watch.zeros[-1] == round(0.8 * size)
    assert all(watch.agree)


def test_the_optimizer_forgets_the_encoder_and_no_head(tmp_path):
    trainer, _, at = run(tmp_path, CUBIC, 8, 9, max_steps=12)
    assert {n for n in at.state[8] if n.startswith("encoder.")}
    assert at.state[9] == {n for n in at.state[8] if n.startswith("heads.")}
    assert {n for n in at.state[9] if n.startswith("heads.")}
    assert trainer.state.global_step == 12


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_what_is_drawn_is_distributed_as_the_architecture_says(tmp_path, kind):
    torch.manual_seed(0)
    model = MultitaskModel(MultitaskConfig(encoder_config=CONFIGS[kind](), tasks=three_tasks()))
    model.save_pretrained(tmp_path)
    model = MultitaskModel.from_pretrained(tmp_path)  # marks its weights as loaded
    before = weights(model.encoder)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(5.0)  # far from any initial value
    state = torch.get_rng_state()
    reinitialise(model.encoder, 3)
    first = weights(model.encoder)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.encoder.named_parameters():
        assert p.abs().max() < 2, f"{name} was not drawn"
        for measure, tolerance in ((torch.std, {"rel": 0.3}), (torch.mean, {"abs": 0.02})):
            assert float(measure(p.detach())) == pytest.approx(float(measure(before[name])), **tolerance), name
    torch.manual_seed(77)
    reinitialise(model.encoder, 3)
    assert_same(first, weights(model.encoder))
    reinitialise(model.encoder, 4)
    assert any(not torch.equal(first[n], t) for n, t in weights(model.encoder).items())


@pytest.mark.parametrize("granularity", ["head", "neuron", "layer"])
def test_parts_stay_pruned_when_the_encoder_is_drawn_anew(tmp_path, granularity):
    config = PruningConfig(sparsity=0.5, granularity=granularity, score_batches=1, start_step=2, reinitialise=True)
    trainer, _, at = run(tmp_path, config, 2, max_steps=5)
    parameters = prunable_parameters(trainer.model)
    masks = trainer.pruner.masks
    assert all((p[~masks[n]] == 0).all() for n, p in parameters.items())
    assert not all(m.all() for m in masks.values())
    fresh = tiny_model()
    reinitialise(fresh.encoder, 0)
    for name, p in prunable_parameters(fresh).items():
        assert torch.equal(at.weights[2][name], p.detach() * masks[name])
    assert len(trainer.model.config.skipped_layers) == (granularity == "layer")


@pytest.mark.parametrize("step", [10, *slow(8, 9, 13)])
def test_a_killed_run_draws_once_and_ends_in_the_bits_of_the_undisturbed_one(tmp_path, step):
    whole = multitask_trainer(tmp_path / "whole", CUBIC, **STEPS | {"max_steps": 14})
    whole.train()
    trainer = killed_and_resumed(tmp_path, CUBIC, step, **STEPS | {"max_steps": 14})
    assert_same(weights(whole.model), weights(trainer.model))
    assert_same(whole.pruner.masks, trainer.pruner.masks)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DynamicConfig(reinitialise=True), "reinitialise: must be false with method dynamic"),
        (lambda: PruningConfig(reinitialise=1), "reinitialise: expected true or false, got 1"),
        (lambda: PruningConfig(reinitialise=True, max_drop=1.0), "reinitialise: must be false with max_drop"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
