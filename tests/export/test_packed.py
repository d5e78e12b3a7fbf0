"""Packed checkpoints restore every bit, are small, and refuse truncated, swapped or hostile files."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from hf_disparse import MultitaskModel, UserError, prunable_parameters
from hf_disparse.export import save_packed
from hf_disparse.export.packed import pack, unpack
from tests.helpers.tiny import CONFIGS, tiny_model, tiny_tokenizer

INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(tensor):  # adding 0.0 turns -0.0, which packing does not keep, into 0.0 and changes nothing else
        return (tensor + 0.0).view(INTEGER[tensor.element_size()]) if tensor.is_floating_point() else tensor

    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


def prune(model: PreTrainedModel, sparsity: float = 0.9, seed: int = 0) -> PreTrainedModel:
    """Sets random weights to zeros of either sign, as multiplying by a mask does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in prunable_parameters(model).values():
        parameter.data.normal_(generator=generator).mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)
    return model


@pytest.fixture(scope="module")
def sparse_model() -> MultitaskModel:
    return prune(tiny_model())


@pytest.fixture
def packed(sparse_model, tmp_path) -> Path:
    save_packed(sparse_model, tmp_path / "packed")
    return tmp_path / "packed"


@settings(max_examples=200)
@given(
    bits=arrays.arrays(np.int32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=20)),
    keep=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_bits_come_back(bits, keep, seed):
    bits[np.random.default_rng(seed).random(bits.shape) >= keep] = 0
    bits[bits == -(2**31)] = 0  # -0.0, whose sign is not kept
    weight = torch.from_numpy(bits).view(torch.float32)
    values, bitmask = pack(weight)
    # brute force: row by row, the most significant bit first
    expected = [
        [
            sum(1 << (7 - j % 8) for j in range(len(row)) if j // 8 == k and row[j] != 0)
            for k in range(-(-len(row) // 8))
        ]
        for row in bits
    ]
    assert bitmask.tolist() == expected
    assert values.view(torch.int32).tolist() == [b for row in bits for b in row if b != 0]
    assert torch.equal(unpack(values, bitmask, weight.shape).view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_values_and_negative_zero_is_zero(dtype):
    weight = torch.tensor([[0.0, -0.0, float("nan"), -float("inf")]], dtype=dtype)
    values, bitmask = pack(weight)
    assert bitmask.tolist() == [[0b0011_0000]]
    again = unpack(values, bitmask, (1, 4))
    assert torch.equal(again.isnan(), weight.isnan()) and again[0, 3] == weight[0, 3]
    assert not again[0, :2].any() and not torch.signbit(again[0, :2]).any()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.133), (torch.bfloat16, 0.165), (torch.float16, 0.165)])
def test_bytes_of_a_matrix_at_90_percent(dtype, most):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 1536, generator=generator)
    weight.view(-1)[torch.randperm(weight.numel(), generator=generator)[: weight.numel() * 9 // 10]] = 0
    values, bitmask = pack(weight.to(dtype))
    assert (values.nbytes + bitmask.nbytes) / weight.to(dtype).nbytes <= most


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_auto_classes_read_it_bit_for_bit(auto, model_type, tmp_path):
    torch.manual_seed(0)
    model = prune(auto.from_config(CONFIGS[model_type]()))
    sizes = save_packed(model, tmp_path / "packed")
    assert sizes["matrices"] == len(prunable_parameters(model))
    loaded, report = auto.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(report.values()), report
    assert same_bits(loaded.state_dict(), model.state_dict())
    expected, encoder = model.base_model.state_dict(), AutoModel.from_pretrained(tmp_path / "packed").state_dict()
    assert same_bits({name: encoder[name] for name in expected}, expected)  # it may also have a new pooler


def test_what_is_loaded_is_an_ordinary_model(packed, sparse_model, tmp_path):
    model = MultitaskModel.from_pretrained(packed)
    assert same_bits(model.state_dict(), sparse_model.state_dict())
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "labels": torch.tensor([1]), "task": "two"}
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in prunable_parameters(model).values())
    model.save_pretrained(tmp_path / "again")
    sparse_model.save_pretrained(tmp_path / "plain")
    assert same_bits(
        load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    )
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert isinstance(AutoModel.from_pretrained(packed), MultitaskModel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, sparse_model, tmp_path):
    save_packed(sparse_model, tmp_path / "packed", dtype=dtype)
    model = MultitaskModel.from_pretrained(tmp_path / "packed")
    assert same_bits(model.state_dict(), {n: t.to(dtype) for n, t in sparse_model.state_dict().items()})
    wide = MultitaskModel.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert same_bits(wide.state_dict(), {n: t.to(dtype).float() for n, t in sparse_model.state_dict().items()})


def test_a_folder_brings_its_tokenizer_and_no_pickle(sparse_model, tmp_path):
    dense = tmp_path / "dense"
    sparse_model.save_pretrained(dense, max_shard_size=4000)
    tiny_tokenizer().save_pretrained(dense)
    assert (dense / "model.safetensors.index.json").is_file()
    (dense / "training_args.bin").write_bytes(b"x")
    save_packed(dense, tmp_path / "packed")
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert same_bits(MultitaskModel.from_pretrained(tmp_path / "packed").state_dict(), sparse_model.state_dict())


def test_dense_matrices_stay_as_they_are(tmp_path):
    model = tiny_model()
    sizes = save_packed(model, tmp_path / "packed")
    assert sizes["matrices"] == 0
    assert same_bits(load_file(tmp_path / "packed" / "model.safetensors"), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_without_the_package_loading_fails(auto, tmp_path):
    model = prune(AutoModelForSequenceClassification.from_config(CONFIGS["bert"]()))
    save_packed(model, tmp_path / "packed")
    code = f"from transformers import {auto} as A; A.from_pretrained({str(tmp_path / 'packed')!r}); print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "size" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 80), "a file that does not parse"),
    ],
)
def test_only_whole_checkpoints_are_packed(change, message, sparse_model, tmp_path):
    sparse_model.save_pretrained(tmp_path / "dense")
    change(tmp_path / "dense")
    with pytest.raises(UserError, match=message):
        save_packed(tmp_path / "dense", tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"], "something was left behind"


def test_an_index_cannot_leave_its_folder(sparse_model, tmp_path):
    sparse_model.save_pretrained(tmp_path / "other")
    sparse_model.save_pretrained(tmp_path / "dense", max_shard_size=4000)
    index = tmp_path / "dense" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], "../other/model.safetensors")
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="which is not in that folder"):
        save_packed(tmp_path / "dense", tmp_path / "packed")


def test_it_packs_neither_twice_nor_into_a_full_folder(packed, tmp_path):
    with pytest.raises(UserError, match="the model is packed already"):
        save_packed(packed, tmp_path / "twice")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        save_packed(tiny_model(), packed)


def test_a_newer_format_is_refused(packed):
    rewrite(packed, config=lambda values: values["quantization_config"].update(version=2))
    with pytest.raises(UserError, match="a newer hf_disparse reads it"):
        AutoModel.from_pretrained(packed)


def rewrite(folder: Path, config=None, tensors=None, forge: bool = False) -> None:
    """Applies `config` to config.json and `tensors` to the stored tensors, in place; `forge` makes the digests fit again."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(path.read_text())
    stored = load_file(weights)
    if tensors:
        tensors(stored)
        save_file(stored, weights, metadata={"format": "pt"})
    if config:
        config(values)
    if forge:  # as an attacker would who knows the format
        form = values["quantization_config"]
        form.pop("sha256")
        text = json.dumps(values, sort_keys=True)
        form["sha256"] = {
            "config.json": hashlib.sha256(text.encode()).hexdigest(),
            "model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
    path.write_text(json.dumps(values))


NAME = "encoder.encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v, b: {NAME: v[:-1], NAME + "_bitmask": b},
            "values: expected 41, one per bit of the bitmask, got (40,)",
        ),
        (lambda v, b: {NAME: v.reshape(1, -1), NAME + "_bitmask": b}, "its bitmask is there, but its values are not"),
        (lambda v, b: {NAME + "_bitmask": b}, "its bitmask is there, but its values are not"),
        (
            lambda v, b: {NAME: v, NAME + "_bitmask": b.flatten()},
            "bitmask: expected uint8 (32, 2), got torch.uint8 (64,)",
        ),
        (lambda v, b: {NAME: v, NAME + "_bitmask": b.float()}, "bitmask: expected uint8 (32, 2), got torch.float32"),
        (lambda v, b: {NAME: v, NAME + "_bitmask": b ^ 1}, "values: expected"),
    ],
)
def test_a_bitmask_that_contradicts_its_values_is_refused_even_if_the_digests_fit(change, message, packed):
    def apply(tensors):
        tensors.update(change(tensors.pop(NAME), tensors.pop(NAME + "_bitmask")))

    rewrite(packed, tensors=apply, forge=True)
    with pytest.raises(UserError, match=re.escape(NAME) + ".*" + re.escape(message)):
        AutoModel.from_pretrained(packed)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_configuration_that_does_not_fit_is_refused_even_if_the_digests_fit(key, packed):
    rewrite(packed, config=lambda values: values["encoder_config"].update({key: 48}), forge=True)
    with pytest.raises((UserError, RuntimeError), match=r"expected|mismatched"):
        AutoModel.from_pretrained(packed)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_two_checkpoints_do_not_mix(name, packed, tmp_path):
    save_packed(prune(tiny_model(seed=1), seed=1), tmp_path / "other")
    if name == "config.json":
        rewrite(
            tmp_path / "other", config=lambda values: values["encoder_config"].update(layer_norm_eps=1.0), forge=True
        )
    shutil.copyfile(tmp_path / "other" / name, packed / name)
    with pytest.raises(UserError, match="its sha256 differs"):
        AutoModel.from_pretrained(packed)


def mutate(folder: Path, seed: int) -> str:
    """Makes one random fault of the kinds that disks, networks and people cause; returns its kind."""
    draw = random.Random(seed)
    path = folder / draw.choice(["model.safetensors", "model.safetensors", "config.json"])
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    at = draw.randrange(draw.choice([8, header, len(data)]))
    kind = draw.choice(["bit", "bits", "truncate", "append", "swap", "zero", "drop", "duplicate"])
    if kind == "bit":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "bits":
        for _ in range(20):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += draw.randbytes(draw.randrange(1, 64))
    elif kind == "swap":
        other = draw.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "drop":
        del data[at : at + draw.randrange(1, 64)]
    else:
        data[at:at] = data[at : at + 64]
    path.write_bytes(data)
    return kind


def load_or_refuse(folder: Path) -> dict[str, torch.Tensor] | None:
    try:
        return MultitaskModel.from_pretrained(folder, local_files_only=True).state_dict()
    except (UserError, ValueError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        assert str(error).strip(), "a refusal says why"
        return None


@pytest.mark.slow
def test_500_faults_load_what_was_saved_or_are_refused(packed, sparse_model, tmp_path, capfd):
    expected, refused = sparse_model.state_dict(), 0
    for seed in range(500):
        folder = tmp_path / "mutated"
        shutil.copytree(packed, folder)
        kind = mutate(folder, seed)
        state = load_or_refuse(folder)
        refused += state is None
        assert state is None or same_bits(state, expected), f"seed {seed}: {kind} went unnoticed"
        shutil.rmtree(folder)
    assert refused > 400  # some faults change nothing, such as swapping two equal bytes


def test_forged_files_never_allocate_more_than_they_hold(packed, sparse_model):
    """Columns that a hostile configuration invents are refused before a matrix of that size is allocated."""
    bitmask = load_file(packed / "model.safetensors")[NAME + "_bitmask"]
    with pytest.raises(UserError, match="bitmask: expected uint8"):
        unpack(torch.zeros(3), bitmask, (2**40, 2**20))


def test_the_header_says_what_the_format_promises(packed):
    with safe_open(packed / "model.safetensors", framework="pt") as stored:
        assert stored.get_slice(NAME).get_shape() == [int((load_file(packed / "model.safetensors")[NAME]).numel())]
        assert stored.get_slice(NAME + "_bitmask").get_shape() == [32, 2]
    assert AutoConfig.from_pretrained(packed).quantization_config["quant_method"] == "hf_disparse"


def test_a_shard_that_lost_a_weight_is_not_packed(sparse_model, tmp_path):
    sparse_model.save_pretrained(tmp_path / "dense", max_shard_size=4000)
    shard = sorted((tmp_path / "dense").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the weight .* is missing, which model.safetensors.index.json says"):
        save_packed(tmp_path / "dense", tmp_path / "packed")


def test_a_truncated_shard_is_named(sparse_model, tmp_path):
    sparse_model.save_pretrained(tmp_path / "dense", max_shard_size=4000)
    shard = sorted((tmp_path / "dense").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{shard.name}: expected whole safetensors, got a file that does not parse"):
        save_packed(tmp_path / "dense", tmp_path / "packed")


def test_a_second_weight_file_is_not_loaded_unchecked(packed):
    shutil.copyfile(packed / "model.safetensors", packed / "model.fp16.safetensors")
    with pytest.raises(
        UserError, match=r"expected the weights in model.safetensors in the same folder, got model.fp16.safetensors"
    ):
        AutoModel.from_pretrained(packed, variant="fp16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quantization_config=[1]), "a quantization_config of another library cannot be exported"),
        (
            lambda c: c.update(quantization_config={"quant_method": "gptq"}),
            "a quantization_config of another library cannot be exported",
        ),
    ],
)
def test_a_foreign_form_is_not_packed(change, message, sparse_model, tmp_path):
    sparse_model.save_pretrained(tmp_path / "dense")
    values = json.loads((tmp_path / "dense" / "config.json").read_text())
    change(values)
    (tmp_path / "dense" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        save_packed(tmp_path / "dense", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_folders_that_cannot_be_written_to(sparse_model, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "inner", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="output_dir: cannot write to"):
            save_packed(sparse_model, folder)
