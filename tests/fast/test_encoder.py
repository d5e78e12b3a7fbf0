"""The encoder in C against float64: transformers' own model, and BERT's equations in numpy."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.encoders import (
    KINDS,
    VOCABULARY,
    assert_close,
    batch,
    encoder,
    hidden,
    reference,
    relative_error,
    sizes,
    sped_up,
)

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")

LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 40, 63, 64, 65, 100, 127, 128, 130, 300]


def check(seed: int) -> None:
    """A random encoder and batch: as in float64; the same bits whatever the threads, the neighbours and the padding."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    model, exact = encoder(kind, seed)
    lengths = [int(rng.choice(LENGTHS)) for _ in range(int(rng.integers(1, 10)))]
    given = batch(rng, lengths, bool(rng.random() < 0.3), kind)
    got = hidden(model, **given)
    there = given["attention_mask"] != 0
    assert_close(exact, got, **given)
    assert not got[~there].any()
    for threads in (2, 3, 5):
        assert torch.equal(hidden(model, threads, **given), got), threads
    for i in {0, len(lengths) - 1}:
        alone = {name: tensor[i : i + 1] for name, tensor in given.items()}
        assert torch.equal(hidden(model, **alone), got[i : i + 1])
    order = torch.from_numpy(rng.permutation(len(lengths)))
    assert torch.equal(hidden(model, 2, **{name: tensor[order] for name, tensor in given.items()}), got[order])
    if there[:, 0].all():  # otherwise a head could read a hidden state of padding, so transformers computes it
        assert torch.equal(model(**given).last_hidden_state, got)


@pytest.mark.parametrize("seed", range(16))
def test_encoders(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(16, 200, 8))
def test_many_encoders(start):
    for seed in range(start, start + 8):
        check(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[1], [64, 64], [63, 1, 130, 2, 64]])
def test_lengths(kind, lengths):
    model, exact = encoder(kind, len(lengths), num_attention_heads=2, **sizes(kind, 24))
    given = batch(np.random.default_rng(0), lengths, kind=kind)
    assert_close(exact, hidden(model, **given), **given)
    if len(set(lengths)) == 1:
        without = {"input_ids": given["input_ids"][:, : lengths[0]]}
        assert_close(exact, hidden(model, **without), **without)


def in_numpy(exact: nn.Module, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
    """BERT in float64 (Devlin et al. 2019; Vaswani et al. 2017, section 3), (batch, tokens, features)."""
    p, config = {name: tensor.detach().numpy() for name, tensor in exact.named_parameters()}, exact.config
    activation = {
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
        "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }[config.hidden_act]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def heads(x):
        return x.reshape(*x.shape[:2], config.num_attention_heads, -1).transpose(0, 2, 1, 3)

    x = p["embeddings.word_embeddings.weight"][ids] + p["embeddings.token_type_embeddings.weight"][types]
    x = norm(x + p["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (heads(linear(x, f"{layer}.attention.self.{name}")) for name in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
        scores = np.where(mask[:, None, None, :] == 1, scores, -np.inf)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        context = attention / attention.sum(-1, keepdims=True) @ v
        context = context.transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(x + linear(context, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        inner = activation(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("left", [False, True])
def test_the_equations_of_bert(act, left):
    rng = np.random.default_rng(len(act))
    model, exact = encoder("bert", len(act), hidden_act=act, hidden_size=36, num_attention_heads=4)
    given = batch(rng, [70, 1, 33, 9], left)
    given["token_type_ids"] = torch.from_numpy(rng.integers(0, 2, given["input_ids"].shape))
    names = ("input_ids", "attention_mask", "token_type_ids")
    expected = torch.from_numpy(in_numpy(exact, *(given[name].numpy() for name in names)))
    there = given["attention_mask"] != 0
    assert relative_error(reference(exact, **given)[there], expected[there]) < 1e-12
    assert relative_error(hidden(model, 2, **given)[there], expected[there]) < 3e-6


@pytest.mark.parametrize("kind", KINDS)
def test_wide_encoders(kind):
    """More than one block of columns, and features that fill no group of rows."""
    model, exact = encoder(kind, 5, num_attention_heads=5, **sizes(kind, 290))
    given = batch(np.random.default_rng(5), [20, 70, 5], kind=kind)
    got = hidden(model, **given)
    assert_close(exact, got, **given)
    assert torch.equal(hidden(model, 3, **given), got)


def test_several_calls_at_once():
    model, _ = encoder("mpnet", 2)
    batches = [batch(np.random.default_rng(seed), [30, 1, 70, 5], kind="mpnet") for seed in range(6)]
    expected = [hidden(model, 2, **given) for given in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = pool.map(lambda given: hidden(model, 2, **given), batches)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_nan_does_not_touch_its_neighbours(kind):
    model, _ = encoder(kind, 3)
    given = batch(np.random.default_rng(3), [9, 5, 12, 3], kind=kind)
    given["input_ids"][given["input_ids"] == VOCABULARY - 1] = 5
    before = hidden(model, **given)
    given["input_ids"][1, 2] = VOCABULARY - 1
    for number in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            next(m for m in model.modules() if type(m) is nn.Embedding).weight[VOCABULARY - 1] = number
        got = hidden(model, 2, **given)
        assert torch.equal(got[[0, 2, 3]], before[[0, 2, 3]])
        assert got[1, :3].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", ["nan", "a nan of other bits", "inf", "-inf"])
def test_weights_that_are_not_finite(kind, number):
    """They make the same hidden states NaN as in transformers; the matrix is of one layer's query, key, value or output."""
    for seed in range(4):
        plain = encoder(kind, 30 + seed, num_attention_heads=2, **sizes(kind, 16))[1].float()
        linears = [m for name, m in plain.named_modules() if type(m) is nn.Linear and "pooler" not in name]
        weight = linears[seed % len(linears)].weight.data
        if number == "a nan of other bits":
            weight.view(torch.int32)[0, 0] = -1
        else:
            weight[0, 0] = float(number)
        given = batch(np.random.default_rng(seed), [9, 1, 30], kind=kind)
        plain.set_attn_implementation("eager")  # torch's own attention takes a softmax of nothing but -inf for 0
        expected = reference(plain, **given)
        got = hidden(sped_up(plain, np.random.default_rng(seed)), **given)
        there = given["attention_mask"] != 0
        assert torch.allclose(got[there], expected[there], atol=1e-4, equal_nan=True)
