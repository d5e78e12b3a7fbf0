"""Adapters that are refused: one line that says why, and the model is as it was, to the bit."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_disparse import MultitaskModel, PruningConfig, TaskConfig, UserError, save_packed
from hf_disparse.export import compact, push, save_compact, save_tasks
from tests.helpers.adapters import (
    TWO,
    adapted,
    adapter,
    assert_unchanged,
    config_of,
    of_peft,
    peft,
    sparse_model,
    state,
    train_by_hand,
)
from tests.helpers.tiny import three_tasks, tiny_model
from tests.helpers.training import multitask_trainer, weights


def test_what_adapters_do_not_go_with_says_so_in_a_line(tmp_path):
    model = adapted("ia3")
    wrapped = peft.get_peft_model(tiny_model().encoder, config_of("lora"))
    calls = [(save_packed, wrapped), (save_compact, wrapped), (save_tasks, wrapped), (push, wrapped)]
    for call, given in calls:
        with pytest.raises(UserError, match=r"^model: expected one of transformers'[^\n]*got a PeftModel\b[^\n]*$"):
            call(given, tmp_path / "out" if call is not push else "me/x")
    for call in (lambda: compact(model), lambda: save_compact(model, tmp_path / "out")):
        with pytest.raises(UserError, match="compact before adding them"):
            call()
    with pytest.raises(UserError, match="prune before adding them"):
        multitask_trainer(tmp_path / "run", PruningConfig(sparsity=0.5, score_batches=1), model=model).train()
    assert not (tmp_path / "out").exists()


def test_a_merge_beside_other_tasks_or_into_nan_is_refused():
    model = adapted("ia3", ["two"])
    before = state(model)
    with pytest.raises(UserError, match="expected one task and its adapter, got tasks two, three, real, adapters two"):
        model.merge_adapter()
    assert_unchanged(model, before)
    with pytest.raises(UserError, match="adapters none"):
        sparse_model(tasks=[TaskConfig(name="only", **TWO)]).merge_adapter()
    model = adapted("hira", ["only"], tasks=[TaskConfig(name="only", **TWO)])
    dict(model.encoder.named_parameters())["encoder.layer.1.attention.self.value.hira_B.only"].data[0] = torch.nan
    bits = weights(model)
    with pytest.raises(UserError, match="merge_adapter: PEFT refuses it: NaNs detected"):
        model.merge_adapter()
    assert bits.keys() == weights(model).keys() and of_peft(model)
    assert all(torch.equal(t, bits[n]) for n, t in weights(model).items() if "hira_B" not in n)


def test_shira_s_largest_r_and_a_mask_of_one_s_own():
    model, r = sparse_model(), 100
    for _ in range(5):  # one for each matrix, at most, for it names the first that is too sparse
        with pytest.raises(UserError, match=rf"SHiRA with r={r} trains .*; set r to at most (\d+)") as refusal:
            model.add_adapter(config_of("shira", r=r), "two")
        r = int(str(refusal.value).split("at most ")[1].split(",")[0])
        least = min(
            int((p != 0).sum())
            for n, p in model.encoder.named_parameters()
            if n.endswith(("query.weight", "value.weight"))
        )
        if r == least // 32:
            break
    assert_unchanged(model, state(sparse_model()))
    model.add_adapter(config_of("shira", r=r), "two")

    def first_ones(base_layer, r, **_):
        mask = torch.zeros(base_layer.weight.numel())
        mask[: r * sum(base_layer.weight.shape)] = 1
        return mask.reshape(base_layer.weight.shape)

    config = config_of("shira", r=2)
    config.mask_fn = first_ones
    model.add_adapter(config, "three")
    places = adapter(model, "three")["encoder.layer.0.attention.self.query.shira_indices"]
    assert places.tolist() == [[i // 16 for i in range(64)], [i % 16 for i in range(64)]]


REFUSED = {
    "a task": (
        lambda: config_of("lora"),
        "four",
        "expected a task without an adapter, one of .*three, real, query, got 'four'",
    ),
    "modules": (lambda: config_of("lora", modules_to_save=["x"]), "three", "modules_to_save: must be None"),
    "bias": (lambda: config_of("lora", bias="all"), "three", "bias: must be 'none'"),
    "prompts": (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "three", "PEFT refuses it|expected a LORA"),
    "no match": (
        lambda: config_of("lora", target_modules=["nothing"]),
        "three",
        "Target modules .*nothing.* not found",
    ),
    "pissa": (
        lambda: config_of("lora", init_lora_weights="pissa"),
        "three",
        "init_lora_weights: expected a bool.*got pissa",
    ),
    "layers": (lambda: config_of("lora", layer_replication=[[0, 2]]), "three", "layer_replication: must be None"),
    "r": (lambda: config_of("lora", r=0), "three", "PEFT refuses it.*`r` should be a positive"),
    "a name": (lambda: config_of("lora"), "query", "would confuse task 'query' with weights of the encoder"),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "second"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_adapter_leaves_the_model_as_it_was(case, fresh):
    config, task, message = REFUSED[case]
    model = adapted("lora", [] if fresh else ["two"], tasks=[*three_tasks(), TaskConfig(name="query", **TWO)])
    if fresh:
        model.encoder.embeddings.requires_grad_(False)
    before = state(model)
    with pytest.raises(UserError, match=message):
        model.add_adapter(config(), task)
    assert_unchanged(model, before)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "second"])
def test_an_adapter_that_fails_at_the_last_layer_is_taken_back_from_the_first(fresh):
    model = sparse_model()
    model.encoder.encoder.layer[1].output.dense.weight.data[1:] = 0
    if not fresh:
        model.add_adapter(config_of("shira"), "two")
        train_by_hand(model)
    before = state(model)
    with pytest.raises(UserError, match=r"has 1?[0-9] that are not pruned; set r to at most 0"):
        model.add_adapter(config_of("shira", target_modules=["query", "output.dense"]), "three")
    assert_unchanged(model, before)


def test_a_second_one_of_a_task_and_a_second_kind_are_refused():
    model = adapted("ia3", ["two"])
    before = state(model)
    with pytest.raises(UserError, match="one of three, real, got 'two'"):
        model.add_adapter(config_of("ia3"), "two")
    with pytest.raises(UserError, match="adapter_config: expected a IA3, as the other tasks have, got LORA"):
        model.add_adapter(config_of("lora"), "three")
    with pytest.raises(UserError, match="expected a task with an adapter, two, got 'three'"):
        model.delete_adapter("three")
    assert_unchanged(model, before)


def test_without_peft_the_way_to_get_it_is_told(monkeypatch, tmp_path):
    adapted("lora").save_pretrained(tmp_path)
    config = config_of("lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lambda: MultitaskModel.from_pretrained(tmp_path), lambda: sparse_model().add_adapter(config, "two")):
        with pytest.raises(UserError, match=r"adapters: .*peft.*; try: pip install 'hf_disparse\[peft\]'"):
            call()
    model = sparse_model()
    model.remove_task("two")
    model.save_pretrained(tmp_path / "plain")  # no adapters, no PEFT
    MultitaskModel.from_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="adapters none"):
        model.merge_adapter()


def of_config(key, value):
    def change(folder):
        path = folder / "adapter-two" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def of_tensors(function):
    def change(folder):
        path = folder / "adapter-two" / "adapter_model.safetensors"
        tensors = load_file(path)
        function(tensors, next(name for name in tensors if "query" in name))
        save_file(tensors, path)

    return change


def pickled(folder):
    path = folder / "adapter-two" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_name("adapter_model.bin"))
    path.unlink()


def of_model(value):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"adapters": value}))

    return change


def write(name: str, content: bytes):
    return lambda folder: (folder / "adapter-two" / name).write_bytes(content)


HOSTILE = {
    "missing": ("lora", of_tensors(lambda t, n: t.pop(n)), "no tensor .*query"),
    "additional": ("lora", of_tensors(lambda t, n: t.update(x=t[n].clone())), "an unknown tensor x"),
    "shape": (
        "hira",
        of_tensors(lambda t, n: t.update({n: t[n][:1].clone()})),
        r": .*query.* of \(1, 16\) instead of",
    ),
    "integers": ("ia3", of_tensors(lambda t, n: t.update({n: t[n].int()})), "of torch.int32 instead of torch.float32"),
    "truncated": (
        "lora",
        lambda f: cut(f / "adapter-two" / "adapter_model.safetensors"),
        "and adapter_model.safetensors: ",
    ),
    "pickled": ("lora", pickled, "cannot read adapter_config.json and adapter_model.safetensors"),
    "no folder": ("lora", lambda f: (f / "adapter-two").rename(f / "gone"), "cannot read adapter_config.json and"),
    "lora's r": ("lora", of_config("r", 10**9), r"\(2, 16\) instead of \(1000000000, 16\)"),
    "hira's r": ("hira", of_config("r", 10**9), r"\(2, 16\) instead of \(1000000000, 16\)"),
    "pattern": ("lora", of_config("rank_pattern", {"query": 10**9}), r"\(2, 16\) instead of \(1000000000, 16\)"),
    "shira's r": ("shira", of_config("r", 10**9), "PEFT refuses it"),
    "text for r": ("lora", of_config("r", "many"), "PEFT refuses it"),
    "a wrong kind": ("lora", of_config("peft_type", "EVIL"), "cannot read adapter_config.json and"),
    "no kind": ("lora", of_config("peft_type", None), "adapter_config"),
    "deep JSON": ("lora", write("adapter_config.json", b"[" * 10**5), "cannot read adapter_config.json and"),
    "a list": ("lora", write("adapter_config.json", b"[1]"), "cannot read adapter_config.json and"),
    "no JSON": ("lora", write("adapter_config.json", b"{"), "cannot read adapter_config.json and"),
    "places": (
        "shira",
        of_tensors(lambda t, n: t[n.replace("weight", "indices")].fill_(16)),
        r"outside a matrix of \(16, 16\)",
    ),
    "below": (
        "shira",
        of_tensors(lambda t, n: t[n.replace("weight", "indices")].fill_(-1)),
        r"outside a matrix of \(16, 16\)",
    ),
    "a path": ("lora", of_model(["../x"]), r"got '\.\./x'"),
    "twice": ("lora", of_model(["two", "two"]), "got 'two'"),
    "no task": ("lora", of_model(["real"]), "adapter-real: cannot read adapter_config.json"),
    "a number": ("lora", of_model(5), "adapters to be a list of tasks, got 5|adapters"),
    "a word": ("lora", of_model("two"), "adapters to be a list of tasks, got two|adapters"),
    "lists": ("lora", of_model([["two"]]), "expected a task without an adapter"),
}  # what is done to the files of the adapter of `two`, and what is said


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_do_not_fit_are_refused(case, tmp_path):
    kind, change, message = HOSTILE[case]
    adapted(kind).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        MultitaskModel.from_pretrained(tmp_path)
    assert "\n" not in str(refusal.value)
    if change.__qualname__.startswith("of_model"):
        return
    for names in ([], ["three"]):
        model = adapted(kind, names)
        before = state(model)
        with pytest.raises(UserError, match=message):
            model.load_adapter(tmp_path, "two", subfolder="adapter-two")
        assert_unchanged(model, before)
    model.load_adapter(tmp_path, "two", subfolder="adapter-three")
