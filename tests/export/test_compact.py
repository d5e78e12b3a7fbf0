"""Compaction changes no output; compact models load from disk, train further and are refused where they do not fit."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, LongformerConfig

from hf_disparse import MaskHooks, MultitaskModel, UserError, apply_masks, find_masks
from hf_disparse.export import compact, save_compact, save_packed
from tests.helpers.compacting import BATCH, close, logits, model_of, prune_parts, same
from tests.helpers.tiny import CONFIGS, tiny_model

WITHOUT_SDPA = ("mpnet", "deberta-v2")


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(name, how) for name in CONFIGS for how in ("eager", "sdpa") if how == "eager" or name not in WITHOUT_SDPA],
)
def test_outputs_stay_the_same_also_after_reloading(model_type, attention, tmp_path):
    model = model_of(model_type, attn_implementation=attention)
    stay = prune_parts(model)
    expected, size = logits(model), sum(p.numel() for p in model.encoder.parameters())
    counts = compact(model)
    assert {kind: counts[kind][1] for kind in stay} == stay and counts["layer"] == (3, 3)
    assert sum(p.numel() for p in model.encoder.parameters()) < size
    close(logits(model), expected)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    same(again, model)
    again.train()(**BATCH, task="two", labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in again.encoder.parameters() if p.ndim == 2)
    again.save_pretrained(tmp_path / "again")
    same(MultitaskModel.from_pretrained(tmp_path / "again").eval(), again.eval())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_compact_model_can_be_compacted_again(model_type, tmp_path):
    model = model_of(model_type)
    prune_parts(model)
    compact(model)
    prune_parts(model, seed=1)
    expected = logits(model)
    compact(model)
    close(logits(model), expected)
    model.save_pretrained(tmp_path)
    same(MultitaskModel.from_pretrained(tmp_path).eval(), model)


@pytest.mark.parametrize("skipped", [[1], [1, 2]])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_skipped_layers_are_dropped(model_type, skipped, tmp_path):
    model = model_of(model_type)
    prune_parts(model)
    compact(model)  # so that the remaining layers differ in shape, which must move with them
    whole = logits(model)
    model.skip_layers(skipped)
    expected = logits(model)
    assert not torch.allclose(whole, expected)
    model.save_pretrained(tmp_path / "masked")
    same(MultitaskModel.from_pretrained(tmp_path / "masked").eval(), model)
    counts = save_compact(model, tmp_path / "compact")
    assert counts["layer"] == (3, 3 - len(skipped))
    assert model.config.skipped_layers == skipped, "a copy is compacted, not the model"
    again = MultitaskModel.from_pretrained(tmp_path / "compact").eval()
    assert again.config.encoder_config.num_hidden_layers == 3 - len(skipped) and not again.config.skipped_layers
    close(logits(again), expected)


def test_training_continues_with_the_cut_optimizer_state():
    """A compacted model trains as the masked one does: weights, AdamW's moments and steps."""
    models, optimizers, labels = [tiny_model().eval(), tiny_model().eval()], [], torch.tensor([0, 1])
    prune_parts(models[0], even=True)
    models[1].load_state_dict(models[0].state_dict())
    masks = find_masks({n: p for n, p in models[0].named_parameters() if p.ndim == 2 and "layer." in n})
    hooks = [MaskHooks(model, masks) for model in models]
    for model in models:
        optimizers.append(torch.optim.AdamW(model.parameters(), lr=1e-2))

    def step(model, optimizer, masks=None):
        model(**BATCH, task="two", labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if masks:
            apply_masks(model, masks)

    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, masks)
    masked, small = models
    hooks[1].remove()  # the masks have the old shapes
    before = sum(p.numel() for p in small.parameters())
    compact(small, optimizers[1])
    assert sum(p.numel() for p in small.parameters()) < before
    for _ in range(5):
        step(masked, optimizers[0], masks)
        step(small, optimizers[1])
        torch.testing.assert_close(logits(small), logits(masked), atol=1e-5, rtol=1e-4)
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizers[1].state.items())


def test_dropped_layers_leave_the_optimizer():
    model = model_of("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**BATCH, task="two", labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    model.skip_layers([0])
    compact(model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= held


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "modernbert", "roberta"])
def test_even_neurons_and_fewer_layers_need_no_package(model_type, tmp_path):
    model = model_of(model_type)
    prune_parts(model, ["neuron"], even=True)
    model.skip_layers([1])
    compact(model)
    plain = AutoModel.from_config(model.config.encoder_config).eval()  # knows only the architecture's configuration
    plain.load_state_dict(model.encoder.state_dict(), strict=False)  # except the pooler, which belongs to the heads
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    code = (
        "import torch; from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"hidden = model(input_ids=torch.tensor({BATCH['input_ids'].tolist()}), "
        f"attention_mask=torch.tensor({BATCH['attention_mask'].tolist()}))[0]\n"
        f"torch.save(hidden.detach(), {str(tmp_path / 'hidden.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    hidden = torch.load(tmp_path / "hidden.pt", weights_only=True)
    torch.testing.assert_close(hidden, model.encoder(**BATCH)[0].detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_plain_model_of_uneven_shapes(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]()).eval()
    prune_parts(model)
    with torch.no_grad():
        expected = model(**BATCH).logits
    model.save_pretrained(tmp_path / "masked")
    save_compact(tmp_path / "masked", tmp_path / "compact")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, expected, atol=2e-6, rtol=1e-5)
    base = AutoModel.from_pretrained(tmp_path / "compact")
    assert torch.equal(base.encoder.layer[0].output.dense.weight, again.bert.encoder.layer[0].output.dense.weight)
    save_packed(tmp_path / "compact", tmp_path / "packed")
    save_packed(again, tmp_path / "packed-too")
    for folder in ("packed", "packed-too"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path / 'compact')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "size" in done.stderr, "without the package loading fails"


def test_a_site_whose_parts_are_all_pruned_keeps_one():
    model = model_of("bert")
    model.encoder.encoder.layer[0].attention.output.dense.weight.data.zero_()
    model.encoder.encoder.layer[0].output.dense.weight.data.zero_()
    expected = logits(model)
    counts = compact(model)
    assert counts["head"] == (12, 9) and counts["neuron"] == (96, 65)
    close(logits(model), expected)


def test_a_model_without_pruned_parts_is_unchanged(tmp_path):
    model = model_of("bert")
    save_compact(model, tmp_path / "compact")
    stored = load_file(tmp_path / "compact" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "compact" / "config.json").read_text())


ATTENTION = "encoder.layer.0.attention.self"


@pytest.mark.parametrize(
    "structure",
    [
        {"heads": {ATTENTION: [0, 9]}},
        {"heads": {ATTENTION: [1, 0]}},
        {"heads": {ATTENTION: [0, 0]}},
        {"heads": {ATTENTION: []}},
        {"heads": {ATTENTION: "0"}},
        {"heads": {ATTENTION: [0.0]}},
        {"heads": {ATTENTION: [True]}},
        {"heads": {"encoder.layer.9.attention.self": [0]}},
        {"heads": {"../../config": [0]}},
        {"heads": [0]},
        {"neurons": {"encoder.layer.0.intermediate.dense": 2**40}},
        {"neurons": {"encoder.layer.0.intermediate.dense": -1}},
        {"neurons": {"encoder.layer.0.output.dense": 4}},
        {"layers": {}},
        [1],
    ],
)
def test_a_structure_that_does_not_fit_is_refused(structure, tmp_path):
    model = model_of("bert")
    prune_parts(model)
    compact(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["structure"] = structure
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantization_config\.structure: expected"):
        MultitaskModel.from_pretrained(tmp_path)


def test_a_structure_of_another_model_is_refused(tmp_path):
    model = model_of("bert")
    prune_parts(model)
    compact(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["structure"]["neurons"]["encoder.layer.0.intermediate.dense"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((UserError, RuntimeError), match=r"expected shape|mismatched"):
        MultitaskModel.from_pretrained(tmp_path)


def test_a_first_layer_that_differs_from_the_others_cannot_be_removed():
    model = model_of("modernbert")
    model.skip_layers([0])
    with pytest.raises(
        UserError, match="the first layer of ModernBertModel differs from the others and cannot be removed"
    ):
        compact(model)


def test_an_optimizer_whose_state_cannot_be_cut_is_refused():
    model = model_of("bert")
    optimizer = torch.optim.Adafactor(model.parameters())
    model(**BATCH, task="two", labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    prune_parts(model)
    with pytest.raises(UserError, match="an optimizer that holds a number per weight, as AdamW does, got Adafactor"):
        compact(model, optimizer)


def test_an_unknown_kind_of_attention_is_refused():
    config = LongformerConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        attention_window=4,
    )
    with pytest.raises(UserError, match="expected an encoder with the layers of BERT"):
        compact(AutoModel.from_config(config))


@pytest.mark.parametrize("change", ["lost", "added", "class"])
def test_a_checkpoint_whose_weights_do_not_fit_its_class_is_not_exported(change, tmp_path):
    """transformers would initialise missing weights at random."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    if change == "lost":
        stored.pop("encoder.encoder.layer.0.output.dense.weight")
    elif change == "added":
        stored["other"] = torch.zeros(2)
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    if change == "class":
        path = tmp_path / "model" / "config.json"
        path.write_text(path.read_text().replace('"MultitaskModel"', '"BertModel"'))
    with pytest.raises(UserError, match=r"expected exactly the weights of a|cannot load the model"):
        save_compact(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
