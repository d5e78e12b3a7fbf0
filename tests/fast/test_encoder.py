"""The encoder in C against float64: transformers' own model, and BERT's equations in numpy."""

import copy
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from hf_disparse.fast.encoder import FastForward
from hf_disparse.fast.linear import FastLinear
from hf_disparse.fast.matrix import StoredMatrix
from hf_disparse.fast.plan import Unfit

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")

VOCABULARY, POSITIONS, PADDING = 50, 340, 1
KINDS = ["bert", "electra", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "modernbert"]
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 40, 63, 64, 65, 100, 127, 128, 130, 300]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def configuration(kind: str, rng: np.random.Generator, **given) -> transformers.PretrainedConfig:
    """A small configuration of random sizes."""
    size = int(rng.choice([1, 2, 3, 5, 8, 13, 16, 32])) * (2 if kind == "modernbert" else 1)
    heads = int(rng.integers(1, 5))
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": size * heads if size * heads > 1 else 2,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.choice([1, 5, 6, 31, 64, 97, 260])),
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PADDING,
    }
    act = str(rng.choice(["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "swish"]))
    if kind == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        names["intermediate_size"] = "hidden_dim"
        common = {names.get(name, name): value for name, value in common.items()}
        common["activation"] = act if act in ("gelu", "relu") else "gelu"
    elif kind == "modernbert":
        common |= {
            "hidden_activation": act,
            "local_attention": int(rng.choice([1, 2, 8, 16, 34, 128])),
            "global_attn_every_n_layers": int(rng.choice([1, 2, 3])),
            "attention_bias": bool(rng.random() < 0.3),
            "mlp_bias": bool(rng.random() < 0.3),
            "norm_bias": bool(rng.random() < 0.3),
            "bos_token_id": 2,
            "eos_token_id": 3,
            "cls_token_id": 2,
            "sep_token_id": 3,
        }
    else:
        common["hidden_act"] = act
    if kind == "electra":
        common["embedding_size"] = int(rng.choice([common["hidden_size"], 3, 8, 70]))
    if kind == "mpnet":
        common["relative_attention_num_buckets"] = int(rng.choice([32, 40]))
    return transformers.AutoConfig.for_model(kind, **(common | given))


def encoder(kind: str, seed: int, **given) -> tuple[nn.Module, nn.Module]:
    """An encoder with zeros, sped up, and the same in float64 by transformers alone."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(configuration(kind, rng, **given)).eval()
    if kind in ("bert", "electra", "roberta") and not given and rng.random() < 0.4:
        make_compact(model, rng)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                spread = 1.5 * parameter.shape[1] ** -0.5  # attention that prefers some tokens
                parameter.copy_(torch.randn_like(parameter) * spread * (torch.rand_like(parameter) < rng.random()))
            elif parameter.ndim == 2:
                parameter.normal_()
            else:
                parameter.normal_(float(name.endswith("weight")), 0.3)
        if kind == "mpnet":
            model.encoder.relative_attention_bias.weight.normal_()
    exact = copy.deepcopy(model).double()
    return sped_up(model, rng), exact


def make_compact(model: nn.Module, rng: np.random.Generator) -> None:
    """Gives each layer a number of heads and of neurons of its own."""
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    for layer in model.encoder.layer:
        inner, kept = int(rng.integers(1, 90)), int(rng.integers(1, heads + 1)) * (hidden // heads)
        for name in ("query", "key", "value"):
            setattr(layer.attention.self, name, nn.Linear(hidden, kept))
        layer.attention.output.dense = nn.Linear(kept, hidden)
        layer.intermediate.dense, layer.output.dense = nn.Linear(hidden, inner), nn.Linear(inner, hidden)


def sped_up(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """The model with stored matrices, some sparse and some dense, and the forward in C."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "pooler" not in name:
            form = StoredMatrix.sparse if rng.random() < 0.6 else StoredMatrix.whole
            model.set_submodule(name, FastLinear(form(module.weight), module.bias).eval())
    model.forward = FastForward(model)
    return model


def batch(rng: np.random.Generator, lengths: list[int], left: bool = False, kind: str = "bert") -> dict:
    """Texts of these lengths, padded to a little more than the longest."""
    length = max(lengths) + int(rng.integers(0, 4))
    ids = torch.from_numpy(rng.integers(4, VOCABULARY, (len(lengths), length)))
    places = torch.arange(length).expand_as(ids)
    counts = torch.tensor(lengths).unsqueeze(1)
    mask = (places >= length - counts if left else places < counts).long()
    given = {"input_ids": torch.where(mask == 1, ids, PADDING), "attention_mask": mask}
    if kind in ("bert", "electra") and rng.random() < 0.5:
        given["token_type_ids"] = torch.from_numpy(rng.integers(0, 2, ids.shape))
    return given


def assert_close(exact: nn.Module, got: torch.Tensor, **given) -> None:
    """Equal to float64 in the tokens of the mask, up to rounding: about as exact as torch in float32."""
    there = given.get("attention_mask", torch.ones(got.shape[:2])) != 0
    expected, plain = reference(exact, **given), reference(copy.deepcopy(exact).float(), **given)
    assert got.dtype == torch.float32 and got.shape == expected.shape and torch.isfinite(got).all()
    assert relative_error(got[there], expected[there]) <= 1e-5 + 4 * relative_error(plain[there], expected[there])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def hidden(model: nn.Module, threads: int = 1, **given) -> torch.Tensor:
    """The last hidden state by C; raises Unfit where transformers would have to do it."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return model.forward.hidden(**given)


def reference(exact: nn.Module, **given) -> torch.Tensor:
    with torch.inference_mode():
        return exact(**given).last_hidden_state


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
    model, exact = encoder(kind, len(lengths), num_attention_heads=2, **_sizes(kind, 24))
    given = batch(np.random.default_rng(0), lengths, kind=kind)
    assert_close(exact, hidden(model, **given), **given)
    if len(set(lengths)) == 1:
        without = {"input_ids": given["input_ids"][:, : lengths[0]]}
        assert_close(exact, hidden(model, **without), **without)


def _sizes(kind: str, size: int) -> dict:
    return {"dim" if kind == "distilbert" else "hidden_size": size}


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
    model, exact = encoder(kind, 5, num_attention_heads=5, **_sizes(kind, 290))
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
        plain = encoder(kind, 30 + seed, num_attention_heads=2, **_sizes(kind, 16))[1].float()
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


def transformers_forward(model: nn.Module, **given):
    with torch.inference_mode():
        return type(model).forward(model, **given)


def assert_as_transformers(model: nn.Module, **given) -> None:
    """The same keys, shapes and numbers as transformers' own forward, in the tokens of the mask."""
    expected = transformers_forward(model, **given)
    with torch.inference_mode():
        got = model(**given)
    assert isinstance(got, tuple) == isinstance(expected, tuple)
    if isinstance(expected, tuple):
        got, expected = dict(enumerate(got)), dict(enumerate(expected))
    assert list(got) == list(expected)
    for name, wanted in expected.items():
        for one, other in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got[name], wanted)), strict=True):
            there = torch.ones(one.shape[:2])
            if name == "last_hidden_state":
                there = given.get("attention_mask", there)
                there = (
                    there
                    if there.ndim == 2
                    else there.any(-1)[:, 0]
                    if there.dtype == torch.bool
                    else there[:, 0, 0] == 0
                )
            assert torch.allclose(one[there != 0], other[there != 0], atol=1e-5, equal_nan=True), name


def _holes(given: dict) -> dict:
    mask = given["attention_mask"].clone()
    mask[0, 1] = 0
    return {"attention_mask": mask}


def _no_tokens(given: dict) -> dict:
    mask = given["attention_mask"].clone()
    mask[1] = 0
    return {"attention_mask": mask}


def _of_type(dtype: torch.dtype):
    return lambda given: {"attention_mask": given["attention_mask"].to(dtype)}


CALLS = {
    "plain": lambda given: {},
    "no mask": lambda given: {"attention_mask": None},
    "int32": lambda given: {"input_ids": given["input_ids"].int()},
    "mask bool": _of_type(torch.bool),
    "mask float32": _of_type(torch.float32),
    "mask float16": _of_type(torch.float16),
    "mask uint8": _of_type(torch.uint8),
    "a hole": _holes,
    "a text without tokens": _no_tokens,
    "padded on the left": lambda given: {name: tensor.flip(1) for name, tensor in given.items()},
    "four dimensions": lambda given: {
        "attention_mask": given["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 12, -1)
    },
    "not contiguous": lambda given: {name: t.T.contiguous().T for name, t in given.items()},
    "expanded": lambda given: {name: t[:1].expand(3, -1) for name, t in given.items()},
    "hidden states": lambda given: {"output_hidden_states": True},
    "attentions": lambda given: {"output_attentions": True},
    "tuple": lambda given: {"return_dict": False},
    "dict": lambda given: {"return_dict": True, "output_attentions": False},
}


@pytest.mark.filterwarnings("ignore:.*sdpa.*")
@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "modernbert"])
@pytest.mark.parametrize("call", CALLS)
def test_calls(kind, call):
    model, _ = encoder(kind, 11, num_attention_heads=2, **_sizes(kind, 16))
    if call == "attentions":
        model.set_attn_implementation("eager")
    given = {k: v for k, v in batch(np.random.default_rng(1), [12, 4, 7], kind="any").items()}
    given = {name: tensor[:, :12] for name, tensor in given.items()}
    given |= CALLS[call](given)
    assert_as_transformers(model, **{name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "mpnet", "distilbert", "modernbert"])
def test_positions_and_embeddings(kind):
    model, _ = encoder(kind, 12)
    ids = batch(np.random.default_rng(2), [9, 9])["input_ids"][:, :9]
    embeddings = model.get_input_embeddings()(ids).detach()
    assert_as_transformers(model, inputs_embeds=embeddings)
    if kind != "distilbert":
        assert_as_transformers(model, input_ids=ids, position_ids=torch.arange(9).flip(0).expand(2, 9) + 2)
    if kind in ("bert", "electra"):
        types = torch.tensor([0, 1] * 4 + [1])
        assert_as_transformers(model, input_ids=ids, token_type_ids=types.expand(2, 9))
        assert_as_transformers(model, input_ids=ids, token_type_ids=types.expand(1, 9))
        assert_as_transformers(model, input_ids=ids, token_type_ids=types.expand(2, 9).int())


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "mpnet"])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_ids_within_the_mask(kind, masked):
    """Their position is that of padding, and those behind them count on."""
    model, exact = encoder(kind, 13)
    given = batch(np.random.default_rng(4), [30, 64, 20], kind=kind)
    given["input_ids"][0, 3:9] = PADDING
    given["input_ids"][1, 0] = PADDING
    given["input_ids"][2, 22:] = 7  # an ordinary id outside of the mask
    if not masked:
        del given["attention_mask"]
    assert_close(exact, hidden(model, **given), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_longer_than_the_tables(kind):
    """As in transformers: an error, or right where ids of padding take no positions or there is no table."""
    model, exact = encoder(kind, 14, max_position_embeddings=20)
    ids = torch.full((2, 300), PADDING)
    ids[:, :9] = 7
    try:
        expected = reference(exact, input_ids=ids)
    except (RuntimeError, IndexError, ValueError) as error:
        with torch.inference_mode(), pytest.raises(type(error)):
            model(input_ids=ids)
        return
    with torch.inference_mode():
        assert relative_error(model(input_ids=ids).last_hidden_state, expected) < 1e-5


WRONG = {
    "an id too large": {"input_ids": torch.full((2, 5), VOCABULARY)},
    "a negative id": {"input_ids": torch.full((2, 5), -1)},
    "ids that are no whole numbers": {"input_ids": torch.full((2, 5), 3.0)},
    "ids that are truth values": {"input_ids": torch.ones(2, 5, dtype=torch.bool)},
    "one dimension": {"input_ids": torch.full((5,), 3)},
    "three dimensions": {"input_ids": torch.full((2, 5, 1), 3)},
    "a mask of another length": {"attention_mask": torch.ones(2, 4)},
    "a mask of more texts": {"attention_mask": torch.ones(3, 5)},
    "types too large": {"token_type_ids": torch.full((2, 5), 2)},
    "types of another length": {"token_type_ids": torch.zeros(2, 4, dtype=torch.long)},
    "types that are no whole numbers": {"token_type_ids": torch.zeros(2, 5)},
    "no ids": {"input_ids": None},
    "no texts": {"input_ids": torch.zeros(0, 5, dtype=torch.long)},
    "no tokens": {"input_ids": torch.zeros(2, 0, dtype=torch.long)},
    "unknown argument": {"nonsense": 3},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_transformers_refuses(wrong):
    """The same kind of error, or the same result."""
    model, _ = encoder("bert", 15)
    given = {"input_ids": torch.full((2, 5), 3), **WRONG[wrong]}
    try:
        expected = transformers_forward(model, **given)
    except Exception as error:
        with torch.inference_mode(), pytest.raises(type(error)):
            model(**given)
    else:
        with torch.inference_mode():
            assert torch.allclose(model(**given)[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_are_obeyed(kind):
    """In place and by new tensors, in every module outside of the matrices."""
    model, _ = encoder(kind, 16, **({} if kind == "modernbert" else {"max_position_embeddings": 64}))
    given = batch(np.random.default_rng(6), [9, 30], kind=kind)
    hidden(model, **given)
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        with torch.no_grad():
            parameter += torch.randn_like(parameter) / 4
            assert_as_transformers(model, **given)
            setattr(module, name.rpartition(".")[2], nn.Parameter(parameter.clone() + torch.randn_like(parameter) / 4))
            assert_as_transformers(model, **given)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_parameters_of_other_sizes(kind):
    """They would be read beyond their ends: as transformers, an error."""
    model, _ = encoder(kind, 17, num_attention_heads=2, **_sizes(kind, 16))
    given = batch(np.random.default_rng(7), [9, 30])
    hidden(model, **given)
    for name, parameter in list(model.named_parameters()):
        module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if "pooler" in name:
            continue
        setattr(module, key, nn.Parameter(parameter.detach()[..., :3].clone()))
        with torch.inference_mode(), pytest.raises(Exception) as error:
            model(**given)
        assert len(str(error.value).splitlines()) < 4
        setattr(module, key, parameter)
    assert_as_transformers(model, **given)


def test_norms_without_weights():
    model, exact = encoder("bert", 18)
    for one in (model, exact):
        norm = one.encoder.layer[0].output.LayerNorm
        norm.register_parameter("weight", None), norm.register_parameter("bias", None)
    assert_as_transformers(model, **batch(np.random.default_rng(8), [9, 30]))


@pytest.mark.parametrize("kind", ["bert", "mpnet", "modernbert"])
def test_other_defaults_of_torch(kind):
    """Someone who works in another precision or on another device still gets float32 on the CPU."""
    model, exact = encoder(kind, 19)
    given = batch(np.random.default_rng(9), [9, 30])
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = hidden(model, **given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(exact, got, **given)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
@pytest.mark.parametrize("left", [False, True])
def test_poolers(kind, left):
    """A pooler reads the first place, where a text that is padded on the left has padding."""
    model, _ = encoder(kind, 20)
    assert_as_transformers(model, **batch(np.random.default_rng(10), [9, 30, 12], left))


def test_no_layers():
    model, exact = encoder("bert", 21, num_hidden_layers=0)
    given = batch(np.random.default_rng(11), [9, 30])
    assert_close(exact, hidden(model, 2, **given), **given)


def test_unfit_is_never_seen():
    model, _ = encoder("bert", 22)
    with pytest.raises(Unfit):
        hidden(model, input_ids=torch.full((2, 5), 3), position_ids=torch.zeros(2, 5))
    assert_as_transformers(model, input_ids=torch.full((2, 5), 3), position_ids=torch.zeros(2, 5, dtype=torch.long))
