"""What `shrink` refuses, in one line and with the model as it was."""

import itertools

import pytest
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DebertaV2Config,
)

import hf_disparse
from hf_disparse import (
    DisparseTrainer,
    MultitaskConfig,
    MultitaskModel,
    SpeedConfig,
    UserError,
    shrink,
    speed_up,
)
from hf_disparse.model.unshared import unshare
from tests.helpers.clock import parts_of, seconds_of, set_clock, some_batches, speed
from tests.helpers.compacting import model_of
from tests.helpers.speeding import MODULE, sparse_model
from tests.helpers.tiny import CONFIGS, three_datasets, three_tasks, tiny_model, tiny_tokenizer
from tests.helpers.training import arguments, assert_same


def refusal(model, batches, config=None, **kwargs) -> str:
    """The one line that refuses to shrink, which leaves the model as it was."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError) as caught:
        shrink(model, batches, config or speed(), **kwargs)
    assert "\n" not in str(caught.value)
    assert_same(before, dict(model.named_parameters()))
    return str(caught.value)


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
