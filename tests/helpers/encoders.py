"""Small encoders of random sizes, sped up, and the same in float64; batches of texts; comparisons."""

import copy

import numpy as np
import torch
import transformers
from torch import nn

from hf_disparse.fast.encoder import FastForward
from hf_disparse.fast.linear import FastLinear
from hf_disparse.fast.matrix import StoredMatrix

VOCABULARY, POSITIONS, PADDING = 50, 340, 1
KINDS = ["bert", "electra", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "modernbert"]


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


def sizes(kind: str, size: int) -> dict:
    return {"dim" if kind == "distilbert" else "hidden_size": size}
