"""Tiny models made as fast as asked, by a clock that knows how long a shape takes."""

import copy
import itertools
import json

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DebertaV2Config,
)

import hf_disparse
from hf_disparse import (
    DisparseTrainer,
    MultitaskConfig,
    MultitaskModel,
    SpeedConfig,
    UserError,
    apply_masks,
    find_masks,
    prunable_parameters,
    shrink,
    speed_up,
)
from hf_disparse.config import PruningConfig
from hf_disparse.export import compact
from hf_disparse.model.architectures import find_sites
from hf_disparse.model.factorise import factorise
from hf_disparse.model.low_rank import low_rank_modules
from hf_disparse.model.unshared import unshare
from hf_disparse.pruning.reconstruction import reconstruct
from hf_disparse.pruning.scores import model_loss
from tests.helpers.clock import SHRINK, seconds_of, set_clock, some_batches
from tests.helpers.compacting import BATCH, close, logits, model_of, same
from tests.helpers.speeding import MODULE, sparse_model
from tests.helpers.tiny import CONFIGS, three_datasets, three_tasks, tiny_model, tiny_tokenizer
from tests.helpers.training import arguments, assert_same, multitask_trainer, weights


def speed(**changes) -> SpeedConfig:
    return SpeedConfig(**{"runtime": "torch", "batch": 2, "length": 8} | ({"speedup": 1.5} | changes))


def parts_of(model) -> dict[str, list[int]]:
    sites = find_sites(model.base_model)
    return {kind: [site.parts for site in sites[kind].values()] for kind in ("head", "neuron")}


def refusal(model, batches, config=None, **kwargs) -> str:
    """The one line that refuses to shrink, which leaves the model as it was."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError) as caught:
        shrink(model, batches, config or speed(), **kwargs)
    assert "\n" not in str(caught.value)
    assert_same(before, dict(model.named_parameters()))
    return str(caught.value)


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


def test_no_speed_is_promised_that_cannot_be_had():
    message = refusal(model_of("bert"), some_batches(), speed(speedup=1000))
    assert message.startswith("speedup: expected at least 4.38e+03 ms a pass") and "got 25 ms; ask for less" in message
    model = model_of("bert")
    done = shrink(model, some_batches(), speed(speedup=None, latency_ms=4375))  # the smallest there is
    assert done.parts == {"head": [1] * 3, "neuron": [1] * 3}


def test_a_speed_that_only_the_table_promises_is_refused(monkeypatch):
    def seconds(encoder):
        """Layers together take what each alone does not."""
        shape = parts_of(encoder)
        return seconds_of(encoder) + (20 if len(shape["head"]) == 3 and sum(map(sum, shape.values())) > 6 else 0)

    set_clock(monkeypatch, seconds)
    message = refusal(model_of("bert"), some_batches(), speed(speedup=2))
    assert message.startswith("speedup: expected at least 2.") and "ask for less" in message


def test_batches_that_tell_nothing_are_refused_before_anything_is_measured(monkeypatch):
    set_clock(monkeypatch, lambda encoder: pytest.fail("measured"))
    assert "got none of any task" in refusal(model_of("bert"), {})
    for criterion in ("curvature", "magnitude"):
        assert "got none of task 'real'" in refusal(
            model_of("bert"), {**some_batches("two"), "real": []}, speed(criterion=criterion)
        )


def test_a_loss_that_is_none_or_not_finite_is_refused():
    batches = some_batches("two")
    nan = refusal(model_of("bert"), batches, loss_fn=lambda model, batch: model(**batch).loss * float("nan"))
    assert nan == "task 'two': expected a finite loss, got nan"
    twice = refusal(model_of("bert"), batches, loss_fn=lambda m, batch: m(**batch).loss + m(**batch).loss)
    assert twice == "task 'two': expected a loss of one pass of the encoder, got one of 2"
    del batches["two"][1]["labels"]
    assert "do the batches have labels?" in refusal(model_of("bert"), batches)


def sped_up(monkeypatch):
    seconds = itertools.cycle([[3.0, 3.0], [1.0, 1.0]])
    monkeypatch.setattr(MODULE, "_seconds", lambda model: next(seconds))
    return speed_up(sparse_model())


def with_layers(change):
    model = tiny_model().eval()
    change(model.encoder.encoder.layer)
    return model


def adapted():
    peft = pytest.importorskip("peft", reason="pip install 'hf_disparse[peft]'")
    model = tiny_model().eval()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]), "two")
    return model


def changed_by(function, *arguments):
    model = tiny_model().eval()
    function(model, *arguments)
    return model


ODD = {
    "sped up": (sped_up, "undo_speed_up"),
    "bfloat16": (lambda _: tiny_model().bfloat16(), "try model.float().cpu()"),
    "half": (lambda _: tiny_model().half(), "try model.float().cpu()"),
    "adapters": (lambda _: adapted(), "shrink it before adding them"),
    "private layers": (lambda _: changed_by(unshare, 1), "shrink it before unsharing"),
    "skipped layers": (lambda _: changed_by(MultitaskModel.skip_layers, [1]), "hf_disparse.export.compact(model)"),
    "a shared matrix": (
        lambda _: with_layers(lambda layers: setattr(layers[1].output.dense, "weight", layers[0].output.dense.weight)),
        "share weights",
    ),
    "a shared module": (
        lambda _: with_layers(lambda layers: setattr(layers[1], "output", layers[0].output)),
        "share weights",
    ),
    "a shared layer": (lambda _: with_layers(lambda layers: layers.__setitem__(1, layers[0])), "share weights"),
    "unknown layers": (
        lambda _: AlbertForSequenceClassification(
            AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        ),
        "expected an encoder with the layers of BERT",
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_cannot_be_shrunk_says_why_before_anything_is_measured(odd, monkeypatch):
    make, words = ODD[odd]
    model = make(monkeypatch)
    set_clock(monkeypatch, lambda encoder: pytest.fail("measured"))
    message = refusal(model, some_batches())
    assert message.startswith("shrink: ") and words in message


def test_a_model_that_cannot_be_refitted_stays_as_it_was():
    config = DebertaV2Config(**{**CONFIGS["deberta-v2"]().to_diff_dict(), "conv_kernel_size": 3, "conv_act": "gelu"})
    model = MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks())).eval()
    assert "must follow one another directly" in refusal(model, some_batches())


def test_a_model_whose_layers_were_skipped_is_shrunk_once_they_are_gone():
    model = model_of("bert")
    model.skip_layers([1])
    compact(model)
    shrink(model, some_batches(), speed())
    assert len(parts_of(model)["head"]) == 2


def test_a_trainer_refuses_to_shrink_and_says_what_does(tmp_path):
    with pytest.raises(UserError) as caught:
        DisparseTrainer(
            tiny_model(),
            arguments(tmp_path),
            pruning_config=SpeedConfig(speedup=3),
            train_dataset=three_datasets(),
            processing_class=tiny_tokenizer(),
        )
    message = str(caught.value)
    assert "hf_disparse.shrink" in message and "masks=find_masks" in message and "\n" not in message
    assert callable(hf_disparse.shrink) and callable(hf_disparse.find_masks)


def test_who_asks_for_a_speed_prunes_to_a_speed(tmp_path):
    config = PruningConfig.from_dict({"speedup": 5})
    assert config == SpeedConfig(speedup=5) and type(config) is SpeedConfig and config.method == "speed"
    assert PruningConfig.from_dict({"latency_ms": 2.5, "batch": 1}) == SpeedConfig(latency_ms=2.5, batch=1)
    config = SpeedConfig(latency_ms=3, runtime="torch", length=7, threads=2, decision="joint", score_batches=3, seed=4)
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config == SpeedConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "speedup: expected either speedup or latency_ms, got neither"),
        ({"speedup": 2, "latency_ms": 3}, "speedup: expected either speedup or latency_ms, got speedup and latency_ms"),
        ({"speedup": 1}, "speedup: expected a number above 1, got 1"),
        ({"speedup": 0.5}, "speedup: expected a number above 1, got 0.5"),
        ({"speedup": -2}, "speedup: "),
        ({"speedup": float("nan")}, "speedup: "),
        ({"speedup": float("inf")}, "speedup: "),
        ({"speedup": "3"}, "speedup: "),
        ({"speedup": True}, "speedup: "),
        ({"latency_ms": 0}, "latency_ms: "),
        ({"speedup": 2, "runtime": "fsat"}, "runtime: unknown value 'fsat'"),
        ({"speedup": 2, "batch": 0}, "batch: expected a whole number of at least 1"),
        ({"speedup": 2, "length": 1.5}, "length: expected a whole number of at least 1"),
        ({"speedup": 2, "threads": True}, "threads: expected a whole number of at least 1"),
        ({"speedup": 2, "criterion": "magnitude", "decision": "sum"}, "decision: must be unanimous with criterion"),
        ({"speedup": 2, "criterion": "snip"}, "criterion: "),
        ({"speedup": 2, "decision": "quorum"}, "decision: "),
        ({"speedup": 2, "score_batches": 0}, "score_batches: "),
        ({"speedup": 2, "sparsity": 0.5}, "sparsity: "),
        ({"speedup": 2, "granularity": "weight"}, "granularity: "),
        ({"speedup": 2, "schedule": "cubic"}, "schedule: "),
        ({"speedup": 2, "reconstruct": True}, "reconstruct: "),
        ({"speedup": 2, "start_step": 3}, "start_step: "),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        SpeedConfig(**values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
