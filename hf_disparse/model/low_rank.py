"""A Linear module as the product of two, so that its rank can be pruned.

W = P diag(s) Q, the singular value decomposition of a weight (out, in), becomes up @ down with up = P sqrt(s), (out, r), and
down = sqrt(s) Q, (r, in). A *component* is a row of `down` with its column of `up`; with k components pruned, the matrix takes
(r - k) (out + in) parameters. Source: FLOP, Wang et al. 2020 (arXiv 1910.04732), section 3; the factors here include their z.
"""

import torch
from torch import Tensor, nn

from hf_disparse.pruning.parts import Site


class LowRankLinear(nn.Module):
    """`up(down(x))` in place of a Linear module: `down` (rank, in), `up` (out, rank) with the bias.

    `weight` is a buffer with a single zero, saved in every file of the model: a plain Linear expects a matrix of that name
    and refuses its size. Without it, transformers would ignore both factors and initialise the weight at random.
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
        """The bias of `up`, (out,), or None."""
        return self.up.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        return self.up(self.down(inputs))


def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns down (r, in) and up (out, r) with up @ down = weight (out, in) up to rounding, r = min(in, out), largest first.

    Computed in float64, because in float32 the product is off by several times the rounding of its factors.
    """
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = values.sqrt()
    return (root.unsqueeze(1) * right).to(weight.dtype), (left * root).to(weight.dtype)


@torch.no_grad()
def to_low_rank(linear: nn.Linear) -> LowRankLinear:
    """Returns a full-rank LowRankLinear with the same outputs as `linear`, up to rounding."""
    module = low_rank_like(linear, min(linear.weight.shape))
    down, up = factors(linear.weight)
    module.down.weight.copy_(down)
    module.up.weight.copy_(up)
    if linear.bias is not None:
        module.bias.copy_(linear.bias)
        module.bias.requires_grad_(linear.bias.requires_grad)
    for factor in (module.down, module.up):
        factor.weight.requires_grad_(linear.weight.requires_grad)
    return module.train(linear.training)


def low_rank_like(linear: nn.Linear, rank: int) -> LowRankLinear:
    """Returns a LowRankLinear of that rank with the sizes, device and dtype of `linear`, but fresh weights."""
    (out_features, in_features), weight = linear.weight.shape, linear.weight
    has_bias = linear.bias is not None
    return LowRankLinear(in_features, rank, out_features, has_bias, weight.device, weight.dtype)


@torch.no_grad()
def to_linear(module: LowRankLinear) -> nn.Linear:
    """Returns a Linear module with the same outputs as `module`, up to rounding."""
    up, down = module.up.weight, module.down.weight
    has_bias = module.bias is not None
    linear = nn.Linear(module.in_features, module.out_features, has_bias, device=up.device, dtype=up.dtype)
    linear.weight.copy_((up.double() @ down.double()).to(up.dtype))
    if has_bias:
        linear.bias.copy_(module.bias)
    return linear.train(module.training)


def low_rank_modules(model: nn.Module) -> dict[str, LowRankLinear]:
    """Name -> module for every LowRankLinear in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def rank_sites(encoder: nn.Module, prefix: str = "") -> dict[str, Site]:
    """Module -> its components as parts: the rows of `down` and the columns of `up`."""
    sites = {}
    for name, module in low_rank_modules(encoder).items():
        places = torch.arange(module.rank)
        members = {f"{prefix}{name}.down": (0, places), f"{prefix}{name}.up": (1, places)}
        sites[f"{prefix}{name}"] = Site(module.rank, members)
    return sites
