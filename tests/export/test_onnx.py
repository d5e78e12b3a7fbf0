"""ONNX: onnxruntime's logits are torch's, at any batch and length, dense and compact."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hf_disparse import MultitaskModel, UserError, compact
from hf_disparse.export import save_onnx, save_packed
from tests.helpers.commands import hf_disparse
from tests.helpers.compacting import model_of, prune_parts
from tests.helpers.tiny import CONFIGS, tiny_model, tiny_tokenizer
from tests.helpers.training import multitask_trainer

onnx = pytest.importorskip("onnx", reason="pip install 'hf_disparse[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'hf_disparse[onnx]'")


def run(folder, **inputs) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def same(folder, model, **kwargs) -> None:
    generator = torch.Generator().manual_seed(0)
    for size, tokens in ((1, 3), (4, 17)):
        ids = torch.randint(4, 44, (size, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 2:] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, **kwargs).logits.numpy()
        np.testing.assert_allclose(run(folder, input_ids=ids, attention_mask=mask), expected, atol=1e-5)


def numbers(folder) -> int:
    """The number of floating point values in the file."""
    tensors = onnx.load(folder / "model.onnx").graph.initializer
    return sum(math.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CONFIGS)
def test_compact_models_give_torch_s_logits(model_type, tmp_path):
    model = model_of(model_type)
    prune_parts(model)
    model.skip_layers([1])
    report = save_onnx(model, tmp_path / "masked", "three")
    same(tmp_path / "masked", model, task="three")
    assert 0 <= report["difference"] < 1e-4 and report["speed"] > 0
    compact(model)
    save_onnx(model, tmp_path / "compact", "three")
    same(tmp_path / "compact", model, task="three")
    assert numbers(tmp_path / "compact") < numbers(tmp_path / "masked")
    assert AutoConfig.from_pretrained(tmp_path / "compact").id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.slow
def test_the_command_on_a_packed_folder(tmp_path):
    model = tiny_model().eval()
    prune_parts(model)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    save_packed(tmp_path / "model", tmp_path / "packed")
    words = ("export", tmp_path / "packed", "--format", "onnx", "--task", "two", "--output_dir", tmp_path / "onnx")
    status, out, _ = hf_disparse(*words)
    assert status == 0 and "times as fast as torch" in out
    same(tmp_path / "onnx", model, task="two")
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx")("w1")["input_ids"] == [2, 5, 3]


def test_a_plain_model(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["distilbert"]()).eval()
    save_onnx(model, tmp_path / "onnx")
    same(tmp_path / "onnx", model)
    with pytest.raises(UserError, match="task: must not be set for a model that has one task, got 'two'"):
        save_onnx(model, tmp_path / "again", "two")


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no task 'four'"):
        save_onnx(tiny_model(), tmp_path / "onnx", "four")


def test_one_of_several_tasks_has_to_be_named(tmp_path):
    with pytest.raises(UserError, match="task: must be set, because the model has several: two, three, real"):
        save_onnx(tiny_model(), tmp_path / "onnx")


@pytest.mark.slow
def test_a_model_that_was_trained_in_bfloat16(tmp_path):
    trainer = multitask_trainer(tmp_path / "run", bf16=True, max_steps=2)
    trainer.train()
    save_onnx(trainer.model, tmp_path / "onnx", "two")
    trainer.save_model()
    same(tmp_path / "onnx", MultitaskModel.from_pretrained(tmp_path / "run").eval(), task="two")
