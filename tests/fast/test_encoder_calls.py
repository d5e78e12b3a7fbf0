"""What callers ask of a sped-up encoder, and what changes under it: as transformers' own forward, or the encoder in C."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from hf_disparse.fast.plan import Unfit
from tests.helpers.encoders import (
    KINDS,
    PADDING,
    VOCABULARY,
    assert_close,
    batch,
    encoder,
    hidden,
    reference,
    relative_error,
    sizes,
)

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")


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
    model, _ = encoder(kind, 11, num_attention_heads=2, **sizes(kind, 16))
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_of_more_positions_makes_no_tables_longer(kind):
    model, _ = encoder(kind, 14, max_position_embeddings=20)
    hidden(model, input_ids=torch.full((1, 9), 7))
    model.config.max_position_embeddings = 2000
    ids = torch.full((2, 300), PADDING)
    ids[:, :9] = 7
    with torch.inference_mode(), pytest.raises(Unfit):
        model.forward.hidden(input_ids=torch.full((2, 300), 7))
    if kind == "modernbert":
        assert_as_transformers(model, input_ids=torch.full((2, 300), 7))


def test_a_window_that_changes_is_obeyed():
    model, _ = encoder("modernbert", 23, local_attention=8, global_attn_every_n_layers=3, num_hidden_layers=3)
    given = batch(np.random.default_rng(12), [40, 30], kind="modernbert")
    for window in (8, 16, 2):
        model.config.local_attention = window
        assert_as_transformers(model, **given)
        assert_as_transformers(model, **given)


def test_rotary_frequencies_that_change_are_obeyed():
    model, _ = encoder("modernbert", 24)
    given = batch(np.random.default_rng(13), [9, 30], kind="modernbert")
    hidden(model, **given)
    for name in dict(model.rotary_emb.named_buffers()):
        getattr(model.rotary_emb, name).mul_(0.5)
    assert_as_transformers(model, **given)


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
    "ids whose sign torch has put off": {"input_ids": torch._neg_view(torch.full((2, 5), -3))},
    "a mask of eight bits": {"attention_mask": torch.ones(2, 5).to(torch.float8_e4m3fn)},
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
def test_parameters_of_othersizes(kind):
    """They would be read beyond their ends: as transformers, an error."""
    model, _ = encoder(kind, 17, num_attention_heads=2, **sizes(kind, 16))
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


def test_an_argument_given_twice():
    model, _ = encoder("bert", 22)
    ids = torch.full((2, 5), 3)
    for forward in (model, lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)):
        with pytest.raises(TypeError, match="multiple values for argument 'attention_mask'"):
            forward(ids, torch.ones_like(ids), attention_mask=torch.ones_like(ids))


def test_unfit_is_never_seen():
    model, _ = encoder("bert", 22)
    with pytest.raises(Unfit):
        hidden(model, input_ids=torch.full((2, 5), 3), position_ids=torch.zeros(2, 5))
    assert_as_transformers(model, input_ids=torch.full((2, 5), 3), position_ids=torch.zeros(2, 5, dtype=torch.long))
