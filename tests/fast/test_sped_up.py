"""What can be done to a sped-up model: saved, copied, moved, compiled, changed; it obeys or refuses in one line."""

import copy
import gc
import io
import os
import pickle
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_disparse
from hf_disparse import (
    DisparseTrainer,
    MaskHooks,
    MultitaskModel,
    PruningCallback,
    PruningConfig,
    UserError,
    apply_masks,
    compact,
    factorise,
    find_masks,
    prunable_parameters,
    save_compact,
    save_onnx,
    save_packed,
    save_tasks,
    score,
    sparsity_report,
    speed_up,
    task_model,
    undo_speed_up,
)
from hf_disparse.fast.linear import FastLinear
from tests.helpers.compacting import BATCH
from tests.helpers.processes import child, messages
from tests.helpers.speeding import (
    MODULE,
    assert_same_bits,
    bits,
    fast_and_slow,
    fast_linears,
    is_fused,
    near,
    outputs,
    sparse_model,
)
from tests.helpers.tiny import three_datasets
from tests.helpers.training import arguments

pytestmark = pytest.mark.usefixtures("gains")
SOME = pytest.mark.parametrize("model_type", ["bert", "mpnet", "deberta-v2"])


def one_line(refused) -> str:
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


# Saved


@SOME
def test_what_is_saved_is_the_dense_model(model_type, tmp_path):
    model, before = fast_and_slow(sparse_model(model_type))
    plain = sparse_model(model_type)
    model.save_pretrained(tmp_path / "saved")
    save_packed(model, tmp_path / "packed")
    for folder in ("saved", "packed"):
        loaded = MultitaskModel.from_pretrained(tmp_path / folder)
        assert_same_bits(bits(loaded), bits(plain))
    assert fast_linears(model)
    near(outputs(model), before)


def test_exports_work_on_a_copy(pair, tmp_path):
    model, plain = pair
    model.skip_layers([1])
    plain.skip_layers([1])
    save_compact(model, tmp_path / "compact")
    near(outputs(MultitaskModel.from_pretrained(tmp_path / "compact")), outputs(plain))
    [folder] = save_tasks(model, tmp_path / "task", "two")
    with torch.no_grad():
        near(
            AutoModelForSequenceClassification.from_pretrained(folder)(**BATCH).logits,
            plain(**BATCH, task="two").logits,
        )
    assert not fast_linears(task_model(model, "two"))
    assert fast_linears(model)


@pytest.mark.slow
def test_onnx(pair, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'hf_disparse[onnx]'")
    assert save_onnx(pair[0], tmp_path / "onnx", "two")["difference"] < 1e-4
    alone = speed_up(task_model(pair[1], "two"))
    assert save_onnx(alone, tmp_path / "alone")["difference"] < 1e-4
    assert fast_linears(alone)


def test_other_weights_can_be_loaded_into_it(pair):
    model, _ = pair
    other = sparse_model()
    for parameter in other.encoder.parameters():
        parameter.data.mul_(1.1)
    expected = outputs(other)
    assert model.load_state_dict(other.state_dict()).missing_keys == []
    assert is_fused(model.encoder)
    near(outputs(model), expected)
    with pytest.raises(RuntimeError, match=r"weight: expected \(16, 32\)"):
        model.encoder.encoder.layer[0].output.dense.load_state_dict(
            {"weight": torch.zeros(3, 3), "bias": torch.zeros(16)}
        )
    with pytest.raises(RuntimeError, match=r"Missing key.*query\.weight"):
        model.load_state_dict({k: v for k, v in other.state_dict().items() if "query.weight" not in k})


# Copied


@SOME
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_fast_and_of_their_own(model_type, again):
    model, before = fast_and_slow(sparse_model(model_type))
    model.skip_layers([1])
    skipped = outputs(model)
    model.skip_layers([])
    other = again(model)
    assert fast_linears(other) == fast_linears(model) and is_fused(other.encoder) == is_fused(model.encoder)
    near(outputs(other), before)
    model.skip_layers([1])
    for parameter in model.parameters():
        parameter.data.mul_(2)
    undo_speed_up(model)
    near(outputs(other), before)
    other.skip_layers([1])
    near(outputs(other), skipped)


class Answers(torch.utils.data.Dataset):
    """Logits computed in the worker that asks for a row."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, i):
        torch.set_num_threads(1)
        return outputs(self.model)


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_in_the_workers_of_a_data_loader(pair, context):
    model, plain = pair
    for answer in DataLoader(
        Answers(model), num_workers=1, batch_size=None, multiprocessing_context=context, timeout=120
    ):
        near(answer, outputs(plain))


def test_after_a_fork():
    """torch's own OpenMP hangs in a child that has more than one thread, so the child asks for one."""
    with child(answers_in_fork) as (_, connection):
        assert list(messages(connection)) == [True]


def answers_in_fork(report) -> None:
    seconds = iter([[3.0], [1.0]])
    MODULE._seconds = lambda model: next(seconds)
    model = speed_up(sparse_model())
    torch.set_num_threads(2)
    expected = outputs(model)
    process = os.fork()
    if not process:
        torch.set_num_threads(1)
        os._exit(0 if torch.allclose(outputs(model), expected, atol=1e-5) else 1)
    report.send(os.waitpid(process, 0)[1] == 0)


def test_threads_call_at_once(pair):
    model, plain = pair
    expected, wrong = outputs(plain), []

    def work():
        for _ in range(20):
            if not torch.allclose(outputs(model), expected, atol=1e-4):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Moved


@SOME
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision(model_type, dtype):
    model, plain = speed_up(sparse_model(model_type)), sparse_model(model_type)
    before = outputs(model)
    with torch.no_grad():
        got, expected = outputs(model.to(dtype)), outputs(plain.to(dtype))
    assert got.dtype == dtype and torch.allclose(got, expected, atol=0.05 if dtype != torch.float64 else 1e-5)
    assert all(t.dtype == dtype for t in model.state_dict().values() if t.is_floating_point())
    assert not is_fused(model.encoder)
    if dtype == torch.float64:
        near(outputs(model.float()), before)
        assert is_fused(model.encoder) == (model_type != "deberta-v2")
    assert_same_bits(bits(undo_speed_up(model)), bits(plain.float() if dtype == torch.float64 else plain))


def test_on_another_device(pair):
    model, _ = pair
    ids = BATCH["input_ids"].to("meta")  # transformers' masks need the values
    assert model.to("meta")(ids, task="two").logits.shape == (2, 2)


# Compiled


@SOME
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled(model_type, fullgraph):
    model, before = fast_and_slow(sparse_model(model_type))
    torch.compiler.reset()  # forget earlier models
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager", dynamic=model_type == "bert")
    with torch.no_grad():
        got = torch.cat([compiled(**BATCH, task=task).logits.flatten() for task in model.tasks])
        near(got, before)
        short = {name: tensor[:1, :4] for name, tensor in BATCH.items()}
        near(compiled(**short, task="two").logits, model(**short, task="two").logits)
        left = {name: tensor.flip(1) for name, tensor in BATCH.items()}
        near(compiled(**left, task="two").logits, model(**left, task="two").logits)


def test_operators_keep_torch_s_rules():
    model = speed_up(sparse_model()).encoder
    linear = model.encoder.layer[0].output.dense
    operators = torch.ops.hf_disparse
    for mask in (BATCH["attention_mask"], None):
        torch.library.opcheck(operators.encode, (BATCH["input_ids"], mask, None, None, model.forward.number))
    torch.library.opcheck(operators.multiply, (torch.randn(2, 3, 32), linear.bias.detach(), linear._number))


@pytest.mark.parametrize(("model_type", "fullgraph"), [("bert", True), ("bert", False), ("deberta-v2", True)])
def test_compiled_it_has_no_gradients_and_is_not_trained(model_type, fullgraph):
    torch.compiler.reset()
    model = speed_up(sparse_model(model_type))
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    given = {**BATCH, "task": "two", "labels": torch.tensor([0, 1])}
    loss = compiled(**given).loss
    near(loss.detach(), model(**given).loss.detach())
    with pytest.raises(UserError, match=r"no gradients.*undo_speed_up") as refused:
        loss.backward()
    one_line(refused)
    model.encoder.requires_grad_(False)
    compiled(**given).loss.backward()  # of the head alone
    assert model.heads["two"].classifier.weight.grad.abs().max() > 0
    model.encoder.requires_grad_(True)
    model.train()
    with pytest.raises(UserError, match=r"cannot be trained.*undo_speed_up") as refused:
        compiled(**given)
    one_line(refused)


def test_an_exported_program_has_no_gradients():
    model = speed_up(task_model(sparse_model(), "two")).eval()
    program = torch.export.export(model, (), BATCH).module()
    with pytest.raises(UserError, match=r"no gradients.*undo_speed_up"):
        program(**BATCH).logits.sum().backward()


def test_an_exported_program_needs_its_model():
    model = speed_up(task_model(sparse_model(), "two")).eval()
    file, expected = io.BytesIO(), outputs(model)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (), BATCH), file)
    file.seek(0)
    program = torch.export.load(file).module()
    with torch.no_grad():
        near(program(**BATCH).logits.flatten(), expected)
        del model
        gc.collect()
        with pytest.raises(UserError, match="needs the sped-up model it was made from") as refused:
            program(**BATCH)
    one_line(refused)


def test_exported():
    model = speed_up(task_model(sparse_model(), "two")).eval()
    rows = {0: torch.export.Dim("texts", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=60)}
    with torch.no_grad():
        program = torch.export.export(model, (), BATCH, dynamic_shapes={name: rows for name in BATCH})
        near(program.module()(**BATCH).logits, model(**BATCH).logits)
        longer = {name: tensor.repeat(2, 3) for name, tensor in BATCH.items()}
        near(program.module()(**longer).logits, model(**longer).logits)
    assert any("hf_disparse.encode" in str(node.target) for node in program.graph.nodes)


def runs_what_another_process_exported(report, file) -> None:
    seconds = iter([[3.0], [1.0]])
    MODULE._seconds = lambda model: next(seconds)
    model = speed_up(task_model(sparse_model(), "two"))
    try:
        torch.export.load(file).module()(**BATCH)
    except UserError as error:
        report.send((str(error), type(model).__name__))


def test_an_exported_program_finds_no_model_of_another_process():
    model = speed_up(task_model(sparse_model(), "two")).eval()
    file = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (), BATCH), file)
    file.seek(0)
    with child(runs_what_another_process_exported, file) as (_, connection):
        [(message, _)] = messages(connection)
    assert "needs the sped-up model it was made from" in message


def traced(encoder, ids):
    return torch.jit.trace(encoder, (ids,), strict=False, check_trace=False)(ids.flip(0))["last_hidden_state"]


def proxied(encoder, ids):
    return make_fx(lambda ids: encoder(ids).last_hidden_state)(ids)(ids.flip(0))


@pytest.mark.parametrize(("model_type", "record"), [("bert", traced), ("bert", proxied), ("deberta-v2", traced)])
def test_recorded_by_other_means(model_type, record):
    """A tracer sees no call of C, and would take the memory before it for the result."""
    model, plain = speed_up(sparse_model(model_type)), sparse_model(model_type)
    with torch.no_grad():
        near(record(model.encoder, BATCH["input_ids"]), plain.encoder(BATCH["input_ids"].flip(0)).last_hidden_state)


@SOME
def test_on_tensors_without_numbers(model_type):
    model = speed_up(sparse_model(model_type)).encoder
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids, embedded = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, 16)
        if model_type != "deberta-v2":
            assert model(ids).last_hidden_state.shape == (2, 6, 16)
            assert model(inputs_embeds=embedded).last_hidden_state.shape == (2, 6, 16)
        linear = next(m for m in model.modules() if isinstance(m, FastLinear) and m.in_features == 16)
        assert linear(embedded).shape == (2, 6, linear.out_features)
    assert linear(embedded).shape == (2, 6, linear.out_features)


def test_transforms_are_refused(pair):
    model, ids = pair[0].encoder, BATCH["input_ids"]
    norms = {name: p.detach() for name, p in model.named_parameters() if "LayerNorm" in name}

    def total(norms):
        return torch.func.functional_call(model, norms, (ids,)).last_hidden_state.sum()

    near(total(norms), model(ids).last_hidden_state.sum())
    for function in (
        lambda: torch.func.grad(total)(norms),
        lambda: torch.func.vmap(lambda row: model(row[None]).last_hidden_state[0], randomness="same")(ids),
    ):
        with pytest.raises(UserError, match=r"torch\.func.*undo_speed_up") as refused:
            function()
        one_line(refused)


# Trained


def test_training_is_refused_with_the_way_back(pair, tmp_path):
    model, plain = pair
    labels = torch.tensor([0, 1])
    model.train()
    with pytest.raises(UserError, match=r"cannot be trained.*undo_speed_up") as refused:
        model(**BATCH, task="two", labels=labels)
    one_line(refused)
    model.eval()
    with pytest.raises(UserError, match=r"no gradients.*undo_speed_up") as refused:
        model(**BATCH, task="two", labels=labels).loss.backward()
    one_line(refused)
    with pytest.raises(UserError, match=r"no gradients.*undo_speed_up"):
        model(**BATCH, task="two", labels=labels, output_hidden_states=True).loss.backward()
    model.encoder.requires_grad_(False)
    model(**BATCH, task="two", labels=labels).loss.backward()  # of the head alone
    assert model.heads["two"].classifier.weight.grad.abs().max() > 0
    undo_speed_up(model).encoder.requires_grad_(True)
    near(outputs(model), outputs(plain))


def test_its_output_can_be_changed_in_place(pair):
    changed = []
    for model in pair:
        hidden = model.encoder(**BATCH).last_hidden_state
        hidden[BATCH["attention_mask"] == 0] = 0
        assert hidden.mul_(2).requires_grad
        changed.append(hidden.detach())
    near(*changed)


def test_what_another_library_wrapped_is_undone_too(pair):
    model, _ = pair
    inner = model.encoder.forward
    model.encoder.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as Accelerate's hooks do
    undo_speed_up(model).train()
    model(**BATCH, task="two", labels=torch.tensor([0, 1])).loss.backward()
    assert model.encoder.encoder.layer[0].output.dense.weight.grad.abs().max() > 0


@SOME
@pytest.mark.parametrize("only", ["LayerNorm.weight", "dense.bias"])
def test_gradients_of_a_few_parameters_are_refused_too(model_type, only):
    """Whichever of the encoder's parameters are frozen."""
    model = speed_up(sparse_model(model_type))
    wanted = next(n for n, _ in model.encoder.named_parameters() if "layer.0." in n and n.endswith(only))
    for name, parameter in model.encoder.named_parameters():
        parameter.requires_grad_(name == wanted)
    with pytest.raises(UserError, match=r"no gradients.*undo_speed_up"):
        model(**BATCH, task="two", labels=torch.tensor([0, 1])).loss.backward()


def test_trainers_refuse_it_in_one_line(pair, tmp_path):
    model, _ = pair
    with pytest.raises(UserError, match=r"the model is sped up.*undo_speed_up") as refused:
        DisparseTrainer(
            model, arguments(tmp_path), train_dataset=three_datasets(), pruning_config=PruningConfig(sparsity=0.5)
        ).train()
    one_line(refused)
    alone = speed_up(task_model(sparse_model(), "two"))
    rows = (
        three_datasets()["two"]
        .select(range(4))
        .map(lambda row: {k: row[k][:4] for k in ("input_ids", "attention_mask")})
    )
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, disable_tqdm=True)
    with pytest.raises(UserError, match=r"cannot be trained.*undo_speed_up") as refused:
        Trainer(alone, args, train_dataset=rows).train()
    one_line(refused)
    assert Trainer(alone, args, eval_dataset=rows).evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    "function", [compact, factorise, prunable_parameters, lambda model: sparsity_report(model, model.encoder, {})]
)
def test_what_needs_dense_matrices_says_so(pair, function):
    with pytest.raises(UserError) as refused:
        function(pair[0])
    assert "the model is sped up; call hf_disparse.undo_speed_up(model) first" in one_line(refused)


def test_masks_and_scores_of_a_sped_up_model(pair, tmp_path):
    model, plain = pair
    parameters = prunable_parameters(plain)
    masks, loaders = find_masks(parameters), {"two": [{**BATCH, "task": "two", "labels": torch.tensor([0, 1])}]}
    before = bits(model)
    for function in (apply_masks, MaskHooks):
        with pytest.raises(UserError, match=f"{function.__name__}: the model is sped up.*undo_speed_up") as refused:
            function(model, masks)
        one_line(refused)
    with pytest.raises(ValueError, match="the model has no parameter 'no'"):
        MaskHooks(plain, {"no": masks.popitem()[1]})
    with pytest.raises(UserError, match=r"no gradients.*undo_speed_up"):
        next(score(model, loaders, parameters=dict(model.encoder.named_parameters())))
    with pytest.raises(ValueError, match=r"uses none of the parameters.*undo_speed_up") as refused:
        next(score(model, loaders, parameters=parameters))  # those of before it was sped up
    one_line(refused)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("kind", ["PruningConfig", "MovementConfig", "L0Config", "RankConfig", "masks"])
def test_the_callback_refuses_a_sped_up_model(kind, tmp_path):
    alone = task_model(sparse_model(), "two")
    masks = find_masks(prunable_parameters(alone)) if kind == "masks" else None
    config = None if masks else getattr(hf_disparse, kind)(sparsity=0.5)
    callback = PruningCallback(config, {"two": [{**BATCH, "labels": torch.tensor([0, 1])}]}, masks=masks)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=4, disable_tqdm=True)
    rows = [{**{name: tensor[0] for name, tensor in BATCH.items()}, "labels": 0}] * 4
    with pytest.raises(UserError, match=r"sped up.*undo_speed_up") as refused:
        Trainer(speed_up(alone), args, train_dataset=rows, callbacks=[callback]).train()
    one_line(refused)
