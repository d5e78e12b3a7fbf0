"""Packed checkpoints loaded for speed, and who calls `speed_up` for the user: the pipeline and `evaluate`."""

import json
import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from hf_disparse import (
    MultitaskConfig,
    MultitaskModel,
    MultitaskPipeline,
    TaskConfig,
    UserError,
    compact,
    load_fast,
    save_packed,
    speed_up,
    unshare,
)
from hf_disparse.fast.packed import packed_weights
from hf_disparse.pruning.sped_up import is_sped_up
from hf_disparse.runs import evaluate
from tests.helpers.adapters import adapted
from tests.helpers.commands import hf_disparse, write_inputs, write_recipe
from tests.helpers.compacting import BATCH, prune_parts
from tests.helpers.processes import child, messages
from tests.helpers.speeding import (
    MODULE,
    assert_same_bits,
    bits,
    fast_linears,
    is_fused,
    near,
    outputs,
    sparse,
    sparse_model,
)
from tests.helpers.tiny import CONFIGS, three_tasks, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("gains")


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_packed_model(model_type, dtype, tmp_path):
    save_packed(sparse_model(model_type), tmp_path / "packed", dtype)
    plain = MultitaskModel.from_pretrained(tmp_path / "packed").float()
    model = load_fast(tmp_path / "packed", MultitaskModel)
    assert packed_weights.get() is None and not is_sped_up(plain)
    assert is_fused(model.encoder) == (model_type != "deberta-v2")
    assert_same_bits(bits(model), bits(plain))
    near(outputs(model), outputs(plain))


def test_a_packed_plain_model_and_its_encoder_alone(tmp_path):
    torch.manual_seed(0)
    plain = sparse(AutoModelForSequenceClassification.from_config(CONFIGS["roberta"]()), 0.9)
    save_packed(plain, tmp_path / "packed")
    model = load_fast(tmp_path / "packed", AutoModelForSequenceClassification)
    assert is_fused(model.base_model)
    near(outputs(model), outputs(plain))
    encoder = load_fast(str(tmp_path / "packed"), AutoModel, add_pooling_layer=False)
    assert is_fused(encoder)
    with torch.no_grad():
        got, expected = encoder(**BATCH)[0], plain.base_model.eval()(**BATCH)[0]
    real = BATCH["attention_mask"].bool()
    near(got[real], expected[real])


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_a_packed_compact_model_with_layers_of_a_task_s_own(model_type, tmp_path):
    plain = sparse_model(model_type)
    prune_parts(plain)
    compact(plain)
    if model_type == "bert":
        unshare(plain, 1, ["three"])
        for parameter in plain.encoder.private.parameters():
            parameter.data.mul_(1.5)
    save_packed(plain, tmp_path / "packed")
    model = load_fast(tmp_path / "packed", MultitaskModel)
    assert is_fused(model.encoder)
    assert_same_bits(bits(model), bits(plain))
    near(outputs(model), outputs(plain))


def test_a_dense_checkpoint_loads_as_well(tmp_path):
    plain = sparse_model()
    plain.save_pretrained(tmp_path)
    model = load_fast(tmp_path, MultitaskModel)
    assert is_fused(model.encoder)
    near(outputs(model), outputs(plain))


def test_one_flipped_bit_is_refused(tmp_path):
    save_packed(sparse_model(), tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    whole = file.read_bytes()
    for place in (-1, len(whole) // 2, -2000):
        broken = bytearray(whole)
        broken[place] ^= 1
        file.write_bytes(broken)
        with pytest.raises(UserError, match="not the exported file"):
            load_fast(tmp_path / "packed", MultitaskModel)
    file.write_bytes(whole)
    assert fast_linears(load_fast(tmp_path / "packed", MultitaskModel))


def test_what_cannot_be_loaded_for_speed(tmp_path):
    save_packed(adapted("lora"), tmp_path / "adapted")
    with pytest.raises(UserError) as caught:
        load_fast(tmp_path / "adapted", MultitaskModel)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match="`dtype` must be float32"):
        load_fast(tmp_path / "adapted", MultitaskModel, dtype=torch.bfloat16)


def test_without_a_compiler_an_ordinary_model_is_loaded(tmp_path, monkeypatch):
    def missing():
        raise UserError("no C compiler was found; install gcc")

    plain = sparse_model()
    save_packed(plain, tmp_path / "packed")
    monkeypatch.setattr(MODULE, "library", missing)
    with pytest.warns(UserWarning, match="stays as it is: no C compiler was found"):
        model = load_fast(tmp_path / "packed", MultitaskModel)
    assert not is_sped_up(model)
    assert_same_bits(bits(model), bits(plain))
    near(outputs(model), outputs(plain))


DENSE = 8 * 12 * 512**2 * 4  # bytes of the matrices of the encoder below


def test_the_dense_matrices_never_exist(tmp_path):
    size = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, vocab_size=64)
    config = BertConfig(**size, max_position_embeddings=64)
    model = sparse(MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks()[:1])), 0.95)
    save_packed(model, tmp_path / "packed")
    tiny = tmp_path / "tiny"
    save_packed(sparse_model(), tiny)
    grown = {}
    for fast in (False, True):
        with child(growth_of_loading, str(tiny), str(tmp_path / "packed"), fast) as (_, connection):
            [grown[fast]] = messages(connection)
    assert grown[False] > DENSE  # so it is seen
    assert grown[True] < 0.35 * DENSE, grown[True] / DENSE


def growth_of_loading(report, tiny: str, folder: str, fast: bool) -> None:
    """By how many bytes the process's peak grows while a model is loaded and answers."""

    def load(path: str) -> None:
        model = load_fast(path, MultitaskModel) if fast else MultitaskModel.from_pretrained(path)
        model(**BATCH, task=next(iter(model.tasks)))

    load(tiny)  # what is imported and compiled at first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(folder)
    report.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


# The pipeline


TASKS = [
    *three_tasks(),
    TaskConfig(name="multi", columns="text", problem_type="multi_label_classification", labels=["a", "b", "c"]),
    TaskConfig(name="words", columns="text", problem_type="token_classification", labels=["x", "y"]),
    TaskConfig(name="pairs", columns=["one", "other"], labels=["same", "not"]),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tiny_model(TASKS)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_packed(sparse(model), tmp_path / "packed")
    tiny_tokenizer().save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def same_answers(got, expected) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            same_answers(got[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(got, expected, strict=True):
            same_answers(one, other)
    else:
        assert got == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("device", [None, -1, "cpu", torch.device("cpu")], ids=str)
def test_the_pipeline(folder, device):
    slow, fast = (MultitaskPipeline.from_pretrained(folder, device=device, fast=fast) for fast in (False, True))
    assert is_fused(fast.model.encoder) and not is_sped_up(slow.model)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", ("w1 w2", "w3 w4 w5"), "w12 w1"]
    same_answers(fast(texts[0]), slow(texts[0]))
    same_answers(fast(texts[3]), slow(texts[3]))
    same_answers(fast(texts), slow(texts))
    for size in (2, 5):
        same_answers(fast(texts[:3], batch_size=size), slow(texts[:3], batch_size=size))
    same_answers(fast(texts[1], tasks=["words", "real"]), slow(texts[1], tasks=["words", "real"]))


def test_a_pipeline_of_a_model(folder):
    model = MultitaskModel.from_pretrained(folder)
    expected = MultitaskPipeline(model, tiny_tokenizer())("w1 w2")
    same_answers(MultitaskPipeline(model, tiny_tokenizer(), fast=True)("w1 w2"), expected)
    assert is_sped_up(model)
    with pytest.raises(UserError, match="float32"):
        MultitaskPipeline(model.half(), tiny_tokenizer(), fast=True)
    with pytest.raises(UserError, match="`dtype` must be float32"):
        MultitaskPipeline.from_pretrained(folder, dtype=torch.bfloat16, fast=True)


# The command


def test_evaluate_gives_the_same_metrics(tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr(evaluate, "speed_up", lambda model: models.append(speed_up(model)))
    inputs = write_inputs(tmp_path)
    run = tmp_path / "run"
    status, _, err = hf_disparse("train", write_recipe(tmp_path, inputs), "--no-analysis")
    assert status == 0, err
    metrics = []
    for options in ((), ("--fast",)):
        status, out, err = hf_disparse("evaluate", run, "--json", *options)
        assert status == 0, err
        metrics.append(json.loads(out))
    assert [is_sped_up(model) for model in models] == [True]
    for measured in metrics:
        measured.pop("speed")
    same_answers(metrics[1], metrics[0])
