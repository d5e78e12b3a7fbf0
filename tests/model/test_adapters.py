"""PEFT adapters: each acts on its own task, trains, travels and merges, and the sparse encoder keeps its bits."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_disparse import (
    MultitaskModel,
    MultitaskPipeline,
    TaskConfig,
    UserError,
    last_whole_checkpoint,
    prunable_parameters,
    save_packed,
)
from hf_disparse.export import save_onnx, task_model
from tests.helpers.adapters import (
    KIND,
    KINDS,
    TWO,
    adapted,
    adapter,
    all_close,
    assert_unchanged,
    by_task,
    config_of,
    of_peft,
    peft,
    sparse_model,
    state,
    train_by_hand,
)
from tests.helpers.compacting import BATCH, close
from tests.helpers.hub_server import run_with_hub, serve
from tests.helpers.resuming import DieAt, Died
from tests.helpers.tiny import CONFIGS, tiny_model, tiny_tokenizer
from tests.helpers.training import assert_same, multitask_trainer, weights


@pytest.mark.parametrize(
    ("kind", "model_type"), [*((k, "bert") for k in KINDS), ("lora", "distilbert"), ("shira", "modernbert")]
)
def test_each_acts_on_its_own_task_as_peft_computes_it(kind, model_type, tmp_path):
    dense = by_task(sparse_model(model_type))
    model = adapted(kind, model_type=model_type)
    with_adapters = by_task(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for task in model.heads:
        encoder = AutoModel.from_config(CONFIGS[model_type]())
        encoder.pooler = None
        encoder.load_state_dict({n.removeprefix("encoder."): t for n, t in stored.items() if n.startswith("encoder.")})
        if task != "real":
            assert (with_adapters[task] - dense[task]).abs().max() > 1e-4
            encoder = peft.PeftModel.from_pretrained(encoder, tmp_path, subfolder=f"adapter-{task}")
        with torch.no_grad():
            hidden = encoder.eval()(**BATCH)[0]
            theirs = model.heads[task](inputs_embeds=hidden, attention_mask=BATCH["attention_mask"]).logits
        close(with_adapters[task], theirs)
    close(with_adapters["real"], dense["real"])


@KIND
def test_a_new_one_is_on_after_a_task_that_has_none(kind):
    model = adapted(kind, ["two"])
    before = by_task(model)
    by_task(model)  # the last task has none, so all are off
    model.add_adapter(config_of(kind), "three")
    train_by_hand(model)
    first = model(**BATCH, task="three").logits
    assert (first - before["three"]).abs().max() > 1e-4
    close(by_task(model)["three"], first)


@KIND
def test_training_moves_an_adapter_by_its_own_batches_and_a_killed_run_resumes(kind, tmp_path):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=12, learning_rate=3e-2)

    def trainer(folder, **kw):
        return multitask_trainer(folder, model=adapted(kind), **settings, **kw)

    before, seen = weights(sparse_model()), []
    whole = trainer(tmp_path / "whole")
    start, step = {task: adapter(whole.model, task) for task in ("two", "three")}, whole.training_step

    def watched(model, inputs, *args):
        now = {task: adapter(model, task) for task in start}
        seen.append((inputs["task"], now))
        return step(model, inputs, *args)

    whole.training_step = watched
    whole.train()
    states = [now for _, now in seen] + [{task: adapter(whole.model, task) for task in start}]
    for (task, now), then in zip(seen, states[1:], strict=True):
        moved = [t for t in start if any(not torch.equal(now[t][n], then[t][n]) for n in now[t])]
        assert moved == [t for t in start if t == task]
    assert {task for task, _ in seen} == {"two", "three", "real"}
    trained = [n for n in start["two"] if not n.endswith("indices")]
    assert all(not torch.equal(start[t][n], states[-1][t][n]) for t in start for n in trained)
    whole.model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(stored[n], before[n]) for n in before if n.startswith("encoder."))
    assert all(not torch.equal(stored[n], before[n]) for n in before if n.endswith("classifier.weight"))

    with pytest.raises(Died):
        trainer(tmp_path / "killed", callbacks=[DieAt(8)]).train()
    again = trainer(tmp_path / "killed")
    train_by_hand(again.model)  # what is in the checkpoint counts, not what is here
    again.train(resume_from_checkpoint=True)
    assert_same(weights(whole.model), weights(again.model))
    assert_same(adapter(whole.model, "two"), adapter(again.model, "two"))


@pytest.mark.parametrize("kind", ["lora", "shira"])
def test_the_best_checkpoint_comes_back_with_its_adapters(kind, tmp_path):
    changes = dict(save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, max_steps=8)
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer = multitask_trainer(tmp_path, model=adapted(kind), learning_rate=3e-3, **changes, **best)
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("-8")
    stored = MultitaskModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(weights(stored), weights(trainer.model))
    last = MultitaskModel.from_pretrained(tmp_path / "checkpoint-8")
    assert any(not torch.equal(t, adapter(last, "two")[n]) for n, t in adapter(stored, "two").items())
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "adapter-two" / "adapter_model.safetensors").write_bytes(b"torn")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_dropout_of_an_adapter_is_off_where_the_model_s_is(tmp_path):
    model = sparse_model()
    model.add_adapter(config_of("lora", lora_dropout=0.5), "two")
    train_by_hand(model).save_pretrained(tmp_path)
    close(by_task(model)["two"], by_task(MultitaskModel.from_pretrained(tmp_path))["two"])


@KIND
def test_what_peft_wrote_is_read_and_trains(kind, tmp_path):
    peft.get_peft_model(sparse_model().encoder, config_of(kind)).save_pretrained(tmp_path)  # with inference_mode
    model = sparse_model()
    model.load_adapter(tmp_path, "two")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert_same({n: stored[f"base_model.model.{n}"] for n in adapter(model, "two")}, adapter(model, "two"))
    assert all(p.requires_grad == (".two" in n) for n, p in model.encoder.named_parameters())


@KIND
def test_several_heads_at_once_give_outputs_and_gradients_of_one_by_one(kind):
    model = adapted(kind)
    tasks = ["real", "two", "three", "two"]
    for task, output in zip(tasks, model.run_heads(tasks, **BATCH), strict=True):
        close(output.logits, by_task(model)[task])

    def gradients(*groups):
        model.zero_grad()
        for group in groups:
            sum(output.logits.pow(2).sum() for output in model.run_heads(group, **BATCH)).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    together, apart = gradients(["two", "three"]), gradients(["two"], ["three"])
    model.gradient_checkpointing_enable()
    all_close(apart, gradients(["two"], ["three"]))
    all_close(apart, together)
    own = [n for n in apart if n.startswith("encoder.")]
    assert len(own) == 2 * len([n for n in adapter(model, "two") if not n.endswith("indices")])


def test_the_pipeline_answers_as_the_tasks_one_by_one():
    model, tokenizer = adapted("hira"), tiny_tokenizer()
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    for text, answer in zip(texts, MultitaskPipeline(model, tokenizer)(texts, batch_size=2), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            found = {task: model(**inputs, task=task).logits[0] for task in model.heads}
        scores = [found[task].softmax(-1).max().item() for task in ("two", "three")] + [found["real"].item()]
        assert [answer[task]["score"] for task in found] == pytest.approx(scores, abs=1e-5)


@KIND
def test_a_folder_holds_it_bit_for_bit_plain_and_packed(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path / "plain")
    assert save_packed(model, tmp_path / "memory") == save_packed(tmp_path / "plain", tmp_path / "folder")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == tiny_model().state_dict().keys()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "memory", "folder")]
    assert sizes[0] > sizes[1] == sizes[2]
    for name in ("plain", "memory", "folder"):
        for cls in (MultitaskModel, AutoModel):
            loaded = cls.from_pretrained(tmp_path / name)
            assert_same(weights(model), weights(loaded))
            assert list(loaded.adapters) == loaded.config.adapters == ["two", "three"]
            flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, loaded)]
            assert flags[0] == flags[1]
            for task in loaded.adapters:
                assert_same(adapter(model, task), adapter(loaded, task))
            all_close(by_task(model), by_task(loaded))
    fresh = MultitaskModel.from_encoder(str(tmp_path / "folder"), [TaskConfig(name="new", **TWO)])
    assert not of_peft(fresh) and not fresh.config.adapters
    plain = {n: t for n, t in weights(sparse_model()).items() if n.startswith("encoder.")}
    assert_same(plain, {n: t for n, t in weights(fresh).items() if n.startswith("encoder.")})


@pytest.mark.slow
def test_it_reloads_from_the_hub_however_it_was_pushed(tmp_path):
    model = adapted("hira", ["two", "three", "real"])
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code = (
        "import contextlib, sys, torch, pathlib\n"
        "from hf_disparse import MultitaskModel\n"
        "from hf_disparse.cli.main import main\n"
        "from hf_disparse.export import push, save_tasks\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "model = MultitaskModel.from_pretrained(folder / 'model')\n"
        "model.push_to_hub('me/own')\n"
        "model.save_pretrained(folder / 'saved', push_to_hub=True, repo_id='me/saved')\n"
        "sys.argv = ['hf-disparse', 'push', str(folder / 'model'), 'me/packed', '--format', 'packed']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "push(folder / 'model', 'me/python', 'plain')\n"
        "for name in ('own', 'saved', 'packed', 'python'):\n"
        "    loaded = MultitaskModel.from_pretrained(f'me/{name}')\n"
        "    torch.save((loaded.state_dict(), list(loaded.adapters)), folder / f'{name}.pt')\n"
        "save_tasks('me/packed', folder / 'tasks')\n"
    )
    with serve() as (hub, address):
        done = run_with_hub(code, address, tmp_path)
        assert done.returncode == 0, done.stderr
        for name in ("own", "saved", "packed", "python"):
            loaded, tasks = torch.load(tmp_path / f"{name}.pt", weights_only=True)
            assert_same(weights(model), loaded)
            assert tasks == ["two", "three", "real"]
            assert {f"adapter-{t}/adapter_{f}" for t in tasks for f in ("config.json", "model.safetensors")} <= set(
                hub.files(f"me/{name}")
            )
        assert hub.files("me/python").keys() == hub.files("me/packed").keys()
        sizes = [len(hub.files(f"me/{name}")["model.safetensors"][0]) for name in ("packed", "own", "saved", "python")]
        assert sizes[0] < sizes[1] == sizes[2] == sizes[3]
    for task, expected in by_task(model).items():
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tasks" / "tasks" / task)
        with torch.no_grad():
            close(plain(**BATCH).logits, expected)


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: p == 0 for name, p in prunable_parameters(model).items()}


@pytest.mark.parametrize("kind", ["ia3", "hira", "shira"])
def test_a_merge_keeps_zeros_and_logits_and_leaves_an_ordinary_model(kind):
    plain = sparse_model(tasks=[TaskConfig(name="only", **TWO)])
    model = adapted(kind, ["only"], tasks=[TaskConfig(name="only", **TWO)])
    with_adapter = by_task(model)
    model.merge_adapter()
    all_close(by_task(model), with_adapter)
    assert_same(zeros(plain), zeros(model))
    assert weights(plain).keys() == weights(model).keys() and plain.config.to_dict() == model.config.to_dict()
    assert not of_peft(model) and all(p.requires_grad for p in model.parameters())
    assert any(
        not torch.equal(p, dict(plain.named_parameters())[n]) for n, p in model.encoder.named_parameters("encoder")
    )


def test_a_merge_that_would_fill_zeros_is_refused_and_that_of_a_dense_encoder_is_not():
    one = [TaskConfig(name="only", **TWO)]
    model = adapted("lora", ["only"], tasks=one)
    before = state(model)
    filled = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n.endswith("base_layer.weight"))
    with pytest.raises(
        UserError, match=rf"LORA would fill {filled:,} of {filled:,} zeros of the encoder; keep .* IA3, HiRA, or SHiRA"
    ):
        model.merge_adapter()
    assert_unchanged(model, before)
    dense = adapted("lora", ["only"], tasks=one, sparsity=0)
    with_adapter = by_task(dense)
    dense.merge_adapter()
    all_close(by_task(dense), with_adapter)
    assert not of_peft(dense)


@KIND
def test_a_plain_task_has_its_adapter_merged_or_is_refused(kind, tmp_path):
    model = adapted(kind)
    before = state(model)
    for task, expected in by_task(model).items():
        if kind == "lora" and task != "real":
            with pytest.raises(UserError, match="merging LORA would fill"):
                task_model(model, task)
            with pytest.raises(UserError, match="merging LORA would fill"):
                save_onnx(model, tmp_path / "onnx", task)
        else:
            with torch.no_grad():
                close(task_model(model, task)(**BATCH).logits, expected)
    assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_has_the_adapter_merged(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'hf_disparse[onnx]'")
    model = adapted("shira")
    save_onnx(model, tmp_path / "onnx", "two")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {name: value.numpy() for name, value in BATCH.items()})
    torch.testing.assert_close(torch.from_numpy(found), by_task(model)["two"], atol=1e-5, rtol=1e-4)


def test_shira_trains_as_many_places_as_it_says_and_no_zeros():
    model = sparse_model()
    chosen = []
    for seed, task in ((1, "two"), (1, "three"), (2, "real")):
        model.add_adapter(config_of("shira", r=2, random_seed=seed), task)
        chosen.append({n: t for n, t in adapter(model, task).items() if n.endswith("indices")})
    for name, places in chosen[0].items():
        weight = model.encoder.get_submodule(name.removesuffix(".shira_indices")).base_layer.weight
        assert len(set(map(tuple, places.T.tolist()))) == places.shape[1] == 2 * sum(weight.shape)
        assert (weight[places[0], places[1]] != 0).all()
    assert_same(chosen[0], chosen[1])
    assert any(not torch.equal(chosen[0][n], chosen[2][n]) for n in chosen[0])


@KIND
@pytest.mark.parametrize("targets", [["query", "value"], ["output.dense", "query"]])
def test_a_removed_one_leaves_what_a_model_that_never_had_it_has(kind, targets):
    alone, model = adapted(kind, ["three"]), adapted(kind, ["three"])
    model.add_adapter(config_of(kind, target_modules=targets), "two")
    by_task(model)
    model.delete_adapter("two")
    assert_unchanged(model, state(alone))
    model.add_adapter(config_of(kind, target_modules=targets), "two")
    model.remove_task("two")
    expected = by_task(alone)
    del expected["two"]
    all_close(expected, by_task(model))
    assert model.config.adapters == ["three"] and [task["name"] for task in model.config.tasks] == ["three", "real"]
    model.delete_adapter("three")
    never = sparse_model()
    never.remove_task("two")
    assert_unchanged(model, state(never))
