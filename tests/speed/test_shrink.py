"""Tiny models made as fast as asked, by a clock that knows how long a shape takes."""

import copy
import itertools
import json

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DebertaV2Config,
)

from hf_disparse import (
    MultitaskConfig,
    MultitaskModel,
    apply_masks,
    find_masks,
    prunable_parameters,
    shrink,
)
from hf_disparse.export import compact
from hf_disparse.model.factorise import factorise
from hf_disparse.model.low_rank import low_rank_modules
from hf_disparse.pruning.reconstruction import reconstruct
from hf_disparse.pruning.scores import model_loss
from tests.helpers.clock import SHRINK, parts_of, seconds_of, set_clock, some_batches, speed
from tests.helpers.compacting import BATCH, close, logits, model_of, same
from tests.helpers.tiny import CONFIGS, three_tasks
from tests.helpers.training import assert_same, multitask_trainer, weights


@pytest.fixture
def masked(monkeypatch) -> list:
    """The models that are made compact, as they were before."""
    seen = []
    monkeypatch.setattr(SHRINK, "compact", lambda model: (seen.append(copy.deepcopy(model)), compact(model)))
    return seen


@pytest.mark.parametrize("runtime", ["torch", "fast"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_becomes_fast_enough_and_answers_as_the_masked_model_does(
    model_type, runtime, masked, tmp_path
):
    model, helps = model_of(model_type), runtime == "fast"
    before = seconds_of(model.encoder, helps)
    done = shrink(model, some_batches(), speed(runtime=runtime, speedup=1.7))
    after = seconds_of(model.encoder, helps)
    assert 0.9 * before / 1.7 <= after <= before / 1.7
    assert (done.before, done.wanted) == pytest.approx((1000 * before, 1000 * before / 1.7))
    assert done.parts == parts_of(model) and (helps or done.zeros == {"head": [0.0] * 3, "neuron": [0.0] * 3})
    close(logits(model), logits(masked[-1]))
    model.save_pretrained(tmp_path)
    same(MultitaskModel.from_pretrained(tmp_path).eval(), model)


@pytest.mark.parametrize("runtime", ["torch", "fast"])
def test_what_stays_is_refitted_on_the_batches_of_all_tasks(runtime, masked):
    model, dense, expected = (model_of("bert") for _ in range(3))
    shrink(model, some_batches(), speed(runtime=runtime))
    whole = {name: p.detach().clone() for name, p in prunable_parameters(dense).items()}
    masks = find_masks(prunable_parameters(masked[-1]))
    apply_masks(expected, masks)
    broken = (logits(expected) - logits(dense)).square().mean()
    rows = [batch for of_task in some_batches().values() for batch in of_task]
    reconstruct(expected, masks, whole, rows, loss_fn=model_loss)
    close(logits(model), logits(expected))
    assert (logits(model) - logits(dense)).square().mean() < broken


def test_deberta_with_keys_shared_between_tokens_and_positions(masked, tmp_path):
    """As in v3."""
    torch.manual_seed(0)
    config = DebertaV2Config(**{**CONFIGS["deberta-v2"]().to_diff_dict(), "share_att_key": True})
    model = MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks())).eval()
    before = seconds_of(model.encoder)
    shrink(model, some_batches(), speed())
    assert seconds_of(model.encoder) <= before / 1.5
    close(logits(model), logits(masked[-1]))
    model.save_pretrained(tmp_path)
    same(MultitaskModel.from_pretrained(tmp_path).eval(), model)


def test_the_table_is_exact_here_and_so_is_the_prediction():
    model = model_of("bert")
    done = shrink(model, some_batches(), speed())
    assert done.predicted == pytest.approx(done.after) == pytest.approx(1000 * seconds_of(model.encoder))
    assert done.speedup == pytest.approx(done.before / done.after)
    assert json.loads(json.dumps(done.to_dict()))["parts"] == parts_of(model)
    heads = ", ".join(map(str, done.parts["head"]))
    assert f"{done.speedup:.2f} times as fast" in done.sentence() and f"heads {heads};" in done.sentence()


def test_milliseconds_may_be_asked_for_in_place_of_a_speedup():
    model = model_of("bert")
    shrink(model, some_batches(), speed(speedup=None, latency_ms=12_000))
    assert 0.9 * 12 <= seconds_of(model.encoder) <= 12
    model, whole = model_of("bert"), model_of("bert")
    done = shrink(model, some_batches(), speed(speedup=None, latency_ms=1e9))
    assert done.parts == parts_of(whole), "it is fast enough as it is"
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-3, rtol=1e-3)


def test_a_machine_on_which_the_table_is_wrong_is_measured_again(monkeypatch):
    """Layers in the table take less than they do in the encoder; what comes out is fast enough nevertheless."""

    def seconds(encoder):
        return seconds_of(encoder) * (1.2 if sum(parts_of(encoder)["head"]) > 3 else 1.0)

    set_clock(monkeypatch, seconds)
    model = model_of("bert")
    before = seconds(model.encoder)
    done = shrink(model, some_batches(), speed(speedup=1.6))
    assert seconds(model.encoder) <= before / 1.6 and done.after == pytest.approx(1000 * seconds(model.encoder))


def test_it_is_the_same_every_time_and_leaves_random_state_threads_and_mode_alone():
    models = [model_of("bert").train() for _ in range(2)]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    for model in models:
        shrink(model, some_batches(), speed(runtime="fast", threads=2))
    assert torch.equal(random, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert all(module.training for model in models for module in model.modules())
    assert_same(*map(weights, models))


@pytest.mark.parametrize("decision", ["unanimous", "sum", "joint"])
@pytest.mark.parametrize("criterion", ["curvature", "magnitude", "random"])
def test_controls_become_as_fast(criterion, decision):
    if criterion != "curvature" and decision != "unanimous":
        return
    model = model_of("bert")
    before = seconds_of(model.encoder)
    shrink(model, some_batches(), speed(criterion=criterion, decision=decision))
    assert seconds_of(model.encoder) <= before / 1.5


@torch.no_grad()
def test_a_head_and_neurons_that_nothing_reads_go_first_and_nothing_is_lost(masked):
    model, useless = model_of("bert"), {0: 2, 1: 0, 2: 3}
    for i, head in useless.items():
        layer = model.encoder.encoder.layer[i]
        layer.attention.output.dense.weight[:, 4 * head : 4 * head + 4] = 0
        layer.output.dense.weight[:, 8 * i : 8 * i + 8] = 0
    expected = logits(model)
    time = seconds_of(model.encoder) - 3 - 3  # without a head and eight neurons in each layer
    shrink(model, some_batches(), speed(speedup=None, latency_ms=1000 * time))
    for i, head in useless.items():
        layer = masked[-1].encoder.encoder.layer[i]
        gone = layer.attention.output.dense.weight.view(16, 4, 4).abs().sum((0, 2)) == 0
        assert gone.nonzero().flatten().tolist() == [head]
        gone = layer.output.dense.weight.abs().sum(0) == 0
        assert gone.nonzero().flatten().tolist() == list(range(8 * i, 8 * i + 8))
    # The refit has nothing to mend but its own damping, in float32.
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)


def test_the_worst_off_task_loses_less_by_the_vote_and_all_together_less_by_the_sum():
    """Both have the same time: the table is exact here."""
    sites, lost = SHRINK._judge(model_of("bert"), some_batches(), speed(), [0.0], model_loss, False), {}
    for decision in ("unanimous", "sum"):
        parts = shrink(model_of("bert"), some_batches(), speed(decision=decision, speedup=1.8)).parts
        stays = iter(itertools.chain(*zip(parts["head"], parts["neuron"], strict=True)))
        by_layer = [name for i in range(3) for name in sites if f".{i}." in name]  # a layer's heads, then its neurons
        assert [sites[name].kind for name in by_layer] == ["head", "neuron"] * 3
        judged = [sites[name].removal for name in by_layer]
        lost[decision] = sum(r.rise[r.left.tolist().index(next(stays))] for r in judged)
    assert lost["unanimous"].max() < lost["sum"].max() and lost["unanimous"].sum() > lost["sum"].sum()


@pytest.mark.parametrize("task", ["two", "real"])
def test_the_scale_of_a_loss_changes_nothing(task):
    models = [model_of("bert") for _ in range(2)]

    def sevenfold(model, batch):
        return (7 if batch["task"] == task else 1) * model(**batch).loss

    first, second = models
    shrink(first, some_batches(), speed())
    shrink(second, some_batches(), speed(), loss_fn=sevenfold)
    assert parts_of(first) == parts_of(second)
    close(logits(first), logits(second))


def test_zeros_stay_under_training(tmp_path):
    model = model_of("bert")
    done = shrink(model, some_batches(), speed(runtime="fast", speedup=1.9))
    assert any(itertools.chain(*done.zeros.values()))
    masks = find_masks(prunable_parameters(model))
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned
    before = weights(model)
    multitask_trainer(tmp_path, None, model, masks=masks, max_steps=6).train()
    assert all(not p[~masks[name]].any() for name, p in prunable_parameters(model).items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


HEADS = {
    "one class": (AutoModelForSequenceClassification, torch.tensor([0, 1]), {"num_labels": 2}),
    "several classes": (
        AutoModelForSequenceClassification,
        torch.tensor([[0.0, 1, 1], [1, 0, 0]]),
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "regression": (AutoModelForSequenceClassification, torch.tensor([0.0, 1.5]), {"num_labels": 1}),
    "tokens": (AutoModelForTokenClassification, torch.arange(12).view(2, 6) % 2, {"num_labels": 2}),
    "masked words": (AutoModelForMaskedLM, torch.arange(12).view(2, 6), {}),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_plain_transformers_model_with_one_task(head, tmp_path):
    make, labels, changes = HEADS[head]
    torch.manual_seed(0)
    config = CONFIGS["bert"]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = make.from_config(config).eval()
    before = seconds_of(model.base_model)
    shrink(model, {"it": [{**BATCH, "labels": labels}]}, speed())
    assert seconds_of(model.base_model) <= before / 1.5
    model.save_pretrained(tmp_path)
    again = make.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        close(again(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_a_compact_model_can_be_shrunk_again(model_type, tmp_path):
    model = model_of(model_type)
    for _ in range(2):
        before = seconds_of(model.encoder)
        shrink(model, some_batches(), speed(speedup=1.4))
        assert seconds_of(model.encoder) <= before / 1.4
    model.save_pretrained(tmp_path)
    same(MultitaskModel.from_pretrained(tmp_path).eval(), model)


def test_matrices_in_two_factors_stay_so(tmp_path):
    model = model_of("bert")
    factorise(model)
    before = seconds_of(model.encoder)
    shrink(model, some_batches(), speed())
    assert seconds_of(model.encoder) <= before / 1.5 and len(low_rank_modules(model.encoder)) == 18
    model.save_pretrained(tmp_path)
    same(MultitaskModel.from_pretrained(tmp_path).eval(), model)


def test_one_example_one_text_in_a_pass_and_more_tokens_than_positions():
    model = model_of("bert")
    one = {"input_ids": torch.tensor([[2, 5, 3]]), "labels": torch.tensor([1]), "task": "two"}
    done = shrink(model, {"two": [one]}, speed(batch=1, length=10_000))
    assert done.batch == 1 and done.length <= 64 and logits(model).isfinite().all()


def test_a_model_whose_layers_were_skipped_is_shrunk_once_they_are_gone():
    model = model_of("bert")
    model.skip_layers([1])
    compact(model)
    shrink(model, some_batches(), speed())
    assert len(parts_of(model)["head"]) == 2
