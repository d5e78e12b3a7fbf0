"""Tasks with layers of their own: the same logits at first, weights that nobody else moves, files that come back."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_disparse import (
    DisparseTrainer,
    MultitaskConfig,
    MultitaskModel,
    PruningConfig,
    UserError,
    apply_masks,
    compact,
    find_masks,
    prunable_parameters,
    save_packed,
    save_tasks,
    sparsity_report,
    task_model,
    unshare,
)
from hf_disparse.model.architectures import layout_of
from hf_disparse.model.multitask import head_config
from tests.helpers.compacting import BATCH, close, logits, model_of, prune_parts, same
from tests.helpers.resuming import DieAt, Died
from tests.helpers.tiny import CONFIGS, three_datasets, tiny_model, tiny_tokenizer
from tests.helpers.training import arguments, assert_same, multitask_trainer, weights


def by_task(model, **kwargs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {task: model(**BATCH, task=task, **kwargs).logits for task in model.heads}


def unshared(
    model_type: str = "bert", layer: int = 1, tasks=("three", "real"), sparsity: float = 0.5
) -> MultitaskModel:
    """A sparse model whose tasks have gone ways of their own since they stopped sharing."""
    model = model_of(model_type)
    apply_masks(model, {n: torch.rand(p.shape) > sparsity for n, p in prunable_parameters(model).items()})
    unshare(model, layer, tasks)
    for p in model.encoder.private.parameters():
        p.data.add_(torch.where(p == 0, 0.0, 0.1 * torch.randn_like(p)))
    return model


def plain(model: MultitaskModel, task: str):
    """The architecture's own model, its weights put together by their names alone."""
    built = AutoModelForSequenceClassification.from_config(head_config(model.config.encoder_config, model.tasks[task]))
    state = {n: t for n, t in model.encoder.state_dict().items() if not n.startswith("private.")}
    layers, first = layout_of(model.encoder).layers, model.config.unshared.get(task, 0)
    for name, tensor in model.encoder.state_dict().items():
        if name.startswith(f"private.{task}."):
            i, _, rest = name.removeprefix(f"private.{task}.").partition(".")
            state[f"{layers}.{first + int(i)}.{rest}"] = tensor
    state = {f"{built.base_model_prefix}.{n}": t for n, t in state.items()}
    built.load_state_dict({**state, **model.heads[task].state_dict()}, strict=True)
    return built.eval()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits_stay_the_same_and_a_task_s_own_layers_act_on_it_alone(model_type):
    model = model_of(model_type)
    before = by_task(model)
    unshare(model, 1, ["three", "real"])
    assert_same(before, by_task(model))
    for parameter in model.encoder.private["three"].parameters():
        parameter.data.add_(0.1)
    after = by_task(model)
    assert (after["three"] - before["three"]).abs().max() > 1e-4
    assert torch.equal(after["two"], before["two"]) and torch.equal(after["real"], before["real"])


@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits_are_those_of_the_plain_model_with_the_task_s_layers(model_type):
    model = unshared(model_type)
    for task, ours in by_task(model).items():
        with torch.no_grad():
            assert torch.equal(ours, plain(model, task)(**BATCH).logits)
    with torch.no_grad():
        together = model.run_heads(list(model.heads), **BATCH)
    assert_same(by_task(model), {task: out.logits for task, out in zip(model.heads, together, strict=True)})


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("first", ["two", "real"])
def test_hidden_states_are_those_of_the_task_s_layers(model_type, first):
    model = unshared(model_type)
    with torch.no_grad():
        model(**BATCH, task=first, output_hidden_states=True)  # transformers hooks the layers that it sees now
        for task in model.heads:
            ours = model(**BATCH, task=task, output_hidden_states=True).hidden_states
            theirs = plain(model, task)(**BATCH, output_hidden_states=True).hidden_states
            assert len(ours) == len(theirs) == 4
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_it_comes_back_from_disk(model_type, tmp_path):
    model = unshared(model_type)
    model.save_pretrained(tmp_path / "plain")
    save_packed(model, tmp_path / "packed")
    save_packed(tmp_path / "plain", tmp_path / "again")
    for folder in ("plain", "packed", "again"):
        loaded = AutoModel.from_pretrained(tmp_path / folder)
        assert list(loaded.state_dict()) == list(model.state_dict()), "the order of the parameters changed"
        same(model, loaded.eval())
        assert loaded.config.unshared == {"three": 1, "real": 1}
    assert (tmp_path / "packed/model.safetensors").stat().st_size < (
        tmp_path / "plain/model.safetensors"
    ).stat().st_size


def test_where_all_tasks_stop_sharing_the_first_keeps_the_encoder_s_layers():
    model = model_of("bert")
    before, size = by_task(model), sum(p.numel() for p in model.encoder.parameters())
    layer = sum(p.numel() for p in model.encoder.encoder.layer[0].parameters())
    unshare(model, 1)
    assert model.config.unshared == {"three": 1, "real": 1}
    assert sum(p.numel() for p in model.encoder.parameters()) == size + 2 * 2 * layer
    assert_same(before, by_task(model))


def test_tasks_may_stop_sharing_at_different_layers(tmp_path):
    model = model_of("bert")
    before = by_task(model)
    unshare(model, 2, ["real"])
    unshare(model, 0, ["two"])
    assert model.config.unshared == {"real": 2, "two": 0}
    assert_same(before, by_task(model))
    model.save_pretrained(tmp_path)
    assert_same(weights(model), weights(AutoModel.from_pretrained(tmp_path)))  # in the same order


@pytest.mark.parametrize("gone", ["two", "three", "real"])
def test_a_task_that_goes_takes_its_layers_along_and_leaves_no_dead_ones(gone):
    model = unshared(tasks=["three"])
    unshare(model, 2, ["real"])
    before = by_task(model)
    model.remove_task(gone)
    before.pop(gone)
    assert_same(before, by_task(model))
    # Where the task that used the encoder's layers is gone, those of the one that shares most take their place.
    assert model.config.unshared == {"two": {"three": 1}, "three": {"real": 2}, "real": {"three": 1}}[gone]
    last = next(iter(model.config.unshared))
    model.remove_task(last)
    assert not hasattr(model.encoder, "private") and model.config.unshared == {}
    [left] = model.heads
    assert torch.equal(by_task(model)[left], before[left])


def test_an_exported_task_has_its_own_layers(tmp_path):
    model = unshared()
    model.save_pretrained(tmp_path / "model")
    save_tasks(tmp_path / "model", tmp_path / "tasks")
    for task, expected in by_task(model).items():
        with torch.no_grad():
            close(task_model(model, task)(**BATCH).logits, expected)
            folder = tmp_path / "tasks" / "tasks" / task
            close(AutoModelForSequenceClassification.from_pretrained(folder)(**BATCH).logits, expected)


@pytest.mark.slow
def test_a_task_in_onnx_has_its_own_layers(tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'hf_disparse[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'hf_disparse[onnx]'")
    from hf_disparse import save_onnx

    model = unshared()
    import onnxruntime

    save_onnx(model, tmp_path / "onnx", "real")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    [found] = session.run(None, {name: value.numpy() for name, value in BATCH.items()})
    torch.testing.assert_close(torch.from_numpy(found), by_task(model)["real"], atol=1e-4, rtol=1e-4)


def test_a_compact_model_may_stop_sharing_and_comes_back(tmp_path):
    model = model_of("bert")
    prune_parts(model)
    compact(model)
    before = by_task(model)
    unshare(model, 1, ["real"])
    assert_same(before, by_task(model))
    model.save_pretrained(tmp_path)
    same(model, AutoModel.from_pretrained(tmp_path).eval())
    with pytest.raises(UserError, match="Compact before unsharing"):
        compact(model)


def test_skipped_layers_are_skipped_in_private_ones_too():
    model = model_of("bert", skipped_layers=[1])
    before = by_task(model)
    unshare(model, 1, ["real"])
    assert_same(before, by_task(model))
    model.skip_layers([2])
    plain_one = model_of("bert", skipped_layers=[2])
    assert_same(by_task(plain_one), by_task(model))
    model.skip_layers([])
    assert_same(by_task(model_of("bert")), by_task(model))


def test_prunable_are_the_private_weights_too_under_the_names_they_are_copied_from():
    model = unshared(tasks=["real"])
    shared = {n: p for n, p in prunable_parameters(model_of("bert")).items()}
    found = prunable_parameters(model)
    assert len(found) == len(shared) + 2 * 6
    chosen = prunable_parameters(model, PruningConfig(target_modules=r".*layer\.2\.attention\.self\.query"))
    assert list(chosen) == [
        "encoder.encoder.layer.2.attention.self.query.weight",
        "encoder.private.real.1.attention.self.query.weight",
    ]
    zeros = sum(int((p == 0).sum()) for p in found.values())
    report = sparsity_report(model, model.encoder, found)
    assert report["prunable"] == zeros / sum(p.numel() for p in found.values())
    assert report["encoder"] == zeros / sum(p.numel() for p in model.encoder.parameters())
    private = {n for n, p in model.encoder.named_parameters() if n.startswith("private.")}
    assert len(list(model.shared_parameters())) == len(list(model.encoder.parameters())) - len(private)


def test_attention_is_chosen_for_private_layers_as_for_shared_ones():
    model = unshared()
    model.set_attn_implementation("eager")
    configs = {id(m.config) for m in model.encoder.modules() if hasattr(m, "config")}
    assert len(configs) == 1
    assert "attentions" in model(**BATCH, task="real", output_attentions=True)


def test_checkpointed_gradients_are_those_of_the_task_s_layers():
    def gradients(model):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(**BATCH, labels=torch.tensor([0.3, 0.1]), task="real").loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(unshared())
    model = unshared()
    model.gradient_checkpointing_enable()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert any(name.startswith("encoder.private.real") for name in found)
    assert not any(name.startswith(("encoder.private.three", "encoder.encoder.layer.1")) for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("loss_weighting", ["fixed", "pcgrad"])
def test_training_holds_the_zeros_and_resumes_bit_for_bit(tmp_path, loss_weighting):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=8, loss_weighting=loss_weighting)
    settings |= dict(gradient_accumulation_steps=2)

    def trainer(folder, **kw):
        model = unshared()
        return multitask_trainer(folder, model=model, masks=find_masks(prunable_parameters(model)), **settings, **kw)

    whole = trainer(tmp_path / "whole")
    masks = find_masks(prunable_parameters(whole.model))
    whole.train()
    after = find_masks(prunable_parameters(whole.model))
    assert all((after[name] <= keep).all() for name, keep in masks.items())
    assert any("private" in name for name in masks)
    with pytest.raises(Died):
        trainer(tmp_path / "cut", callbacks=[DieAt(5)]).train()
    resumed = trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(whole.model), weights(resumed.model))


def test_a_task_s_own_layers_learn_from_its_own_batches(tmp_path):
    model = unshared()
    before = weights(model)
    data = {"three": three_datasets()["three"]}
    DisparseTrainer(model, arguments(tmp_path), train_dataset=data, processing_class=tiny_tokenizer()).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("encoder.private.three.") for name in moved)
    assert not any(
        name.startswith(("encoder.private.real", "encoder.encoder.layer.1", "encoder.encoder.layer.2"))
        for name in moved
    )


def test_from_encoder_takes_the_shared_encoder(tmp_path):
    model = unshared()
    model.save_pretrained(tmp_path)
    fresh = MultitaskModel.from_encoder(str(tmp_path), list(model.tasks.values()))
    shared = {n: t for n, t in model.encoder.state_dict().items() if not n.startswith("private.")}
    assert fresh.config.unshared == {}
    assert_same(shared, fresh.encoder.state_dict())


@pytest.mark.parametrize(
    ("layer", "tasks", "message"),
    [
        (3, None, "layer: expected one of the encoder's 3, 0 to 2, got 3"),
        (-1, None, "layer: expected one of the encoder's 3"),
        (True, None, "layer: expected one of the encoder's 3"),
        (1, ["four"], "tasks: expected a list of tasks that share all layers, two, three, real"),
        (1, [], "tasks: expected a list"),
        (1, "two", "tasks: expected a list"),
    ],
)
def test_what_is_not_there_cannot_be_unshared(layer, tasks, message):
    model = model_of("bert")
    with pytest.raises(UserError, match=message):
        unshare(model, layer, tasks)
    assert torch.equal(logits(model), logits(model_of("bert"))) and model.config.unshared == {}


def test_what_does_not_go_together_is_refused(tmp_path):
    model = unshared()
    with pytest.raises(UserError, match="share all layers, two, got"):
        unshare(model, 1, ["real"])
    single = model_of("bert")
    single.remove_task("two")
    single.remove_task("real")
    with pytest.raises(UserError, match="several tasks"):
        unshare(single, 1)
    with pytest.raises(UserError, match="have layers of their own; prune first, then call unshare"):
        multitask_trainer(tmp_path, PruningConfig(sparsity=0.8, score_batches=1), model=model).train()


def test_adapters_and_private_layers_exclude_one_another():
    peft = pytest.importorskip("peft", reason="pip install 'hf_disparse[peft]'")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(UserError, match="share all layers"):
        unshared().add_adapter(config, "two")
    model = model_of("bert")
    model.add_adapter(config, "two")
    with pytest.raises(UserError, match="without adapters"):
        unshare(model, 1)


@pytest.mark.parametrize(
    "entry", [{"four": 1}, {"two": 3}, {"two": -1}, {"two": True}, {"two": "1"}, {"two": None}, ["two"], "two", 1]
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, entry):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["unshared"] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="unshared: expected"):
        MultitaskModel.from_pretrained(tmp_path)


def test_a_configuration_makes_the_private_layers():
    config = MultitaskConfig(
        encoder_config=CONFIGS["bert"](), tasks=list(tiny_model().tasks.values()), unshared={"real": 1}
    )
    assert len(MultitaskModel(config).encoder.private["real"]) == 1


def test_gradient_surgery_is_on_what_tasks_share(tmp_path):
    settings = dict(max_steps=1, gradient_accumulation_steps=3, task_sampling="round_robin", max_grad_norm=0.0)
    settings |= dict(optim="sgd", learning_rate=1.0, weight_decay=0.0)
    after = []
    for kind in ("fixed", "pcgrad"):
        trainer = multitask_trainer(tmp_path, model=unshared(), loss_weighting=kind, **settings)
        trainer.train()
        after.append(weights(trainer.model))
    (theirs, ours), start = after, weights(unshared())
    private = [name for name in ours if name.startswith("encoder.private.")]
    assert any(not torch.equal(ours[name], start[name]) for name in private)
    assert_same({name: theirs[name] for name in private}, {name: ours[name] for name in private})
    assert any(not torch.equal(ours[name], theirs[name]) for name in set(ours) - set(private))
