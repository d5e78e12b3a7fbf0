"""A Linear module as the product of two, so that what is pruned is its rank. Layer 2; knows torch only.

W = P diag(s) Q, the singular value decomposition of a weight (out, in), becomes up @ down with up = P sqrt(s), (out, r), and
down = sqrt(s) Q, (r, in). A *component* is a row of `down` with its column of `up`; without k of them the matrix takes
(r - k) (out + in) parameters. Source: FLOP, Wang et al. 2020 (arXiv 1910.04732), section 3; their z is in the factors here.
"""

import torch
from torch import Tensor, nn

from hf_disparse.pruning.parts import Site


class LowRankLinear(nn.Module):
    """`up(down(x))` in place of a Linear module: `down` (rank, in), `up` (out, rank) with the bias.

    `weight` is one zero and a buffer, which every file of the model holds: where a plain Linear expects a matrix of that
    name, loading stops at its size. Without it transformers would leave both factors aside and make up a weight.
    """

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.down = nn.Linear(in_features, rank, bias=False, **where)
        self.up = nn.Linear(rank, out_features, bias=bias, **where)
        self.register_buffer("weight", torch.zeros(1, **where))

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.up.in_features

    @property
    def bias(self) -> nn.Parameter | None:
        """That of `up`."""
        return self.up.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        return self.up(self.down(inputs))


def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """down (r, in) and up (out, r) with up @ down = weight (out, in) within rounding, r = min(in, out), largest first.

    Computed in float64, for in float32 the product is off by several times the rounding of its factors.
    """
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = values.sqrt()
    return (root.unsqueeze(1) * right).to(weight.dtype), (left * root).to(weight.dtype)


@torch.no_grad()
def split(linear: nn.Linear) -> LowRankLinear:
    """A module with the outputs of `linear`, at full rank."""
    module = empty(linear, min(linear.weight.shape))
    down, up = factors(linear.weight)
    module.down.weight.copy_(down)
    module.up.weight.copy_(up)
    if linear.bias is not None:
        module.bias.copy_(linear.bias)
        module.bias.requires_grad_(linear.bias.requires_grad)
    for factor in (module.down, module.up):
        factor.weight.requires_grad_(linear.weight.requires_grad)
    return module.train(linear.training)


def empty(linear: nn.Linear, rank: int) -> LowRankLinear:
    """A module of that rank to stand in place of `linear`, its weights not those of `linear` yet."""
    (out_features, in_features), weight = linear.weight.shape, linear.weight
    has_bias = linear.bias is not None
    return LowRankLinear(in_features, rank, out_features, has_bias, weight.device, weight.dtype)


@torch.no_grad()
def product(module: LowRankLinear) -> nn.Linear:
    """A Linear module with the outputs of `module`."""
    up, down = module.up.weight, module.down.weight
    has_bias = module.bias is not None
    linear = nn.Linear(module.in_features, module.out_features, has_bias, device=up.device, dtype=up.dtype)
    linear.weight.copy_((up.double() @ down.double()).to(up.dtype))
    if has_bias:
        linear.bias.copy_(module.bias)
    return linear.train(module.training)


def replace(encoder: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` says."""
    parent, _, last = name.rpartition(".")
    setattr(encoder.get_submodule(parent), last, module)


def low_rank_modules(model: nn.Module) -> dict[str, LowRankLinear]:
    """name -> module, of all that are there."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def rank_sites(encoder: nn.Module, prefix: str = "") -> dict[str, Site]:
    """module -> its components as parts: the rows of `down` and the columns of `up`."""
    sites = {}
    for name, module in low_rank_modules(encoder).items():
        places = torch.arange(module.rank)
        members = {f"{prefix}{name}.down": (0, places), f"{prefix}{name}.up": (1, places)}
        sites[f"{prefix}{name}"] = Site(module.rank, members)
    return sites
