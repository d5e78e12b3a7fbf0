"""Two zeros in every four weights, on CUDA: torch's semi-structured matrices, by the same call."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_disparse.fast.linear import SpedUpLinear, refuse_gradients

_ROWS, _COLUMNS = 32, 64  # torch's CUTLASS kernels take multiples of them, cuSPARSELt's of 16
_CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores


class SemiStructuredLinear(nn.Linear, SpedUpLinear):
    """A Linear module whose weight is a `SparseSemiStructuredTensor`; files of the model hold the dense matrix."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        inputs = self.refuse_training(inputs)
        return refuse_gradients(functional.linear(inputs, self.weight, self.bias), inputs)

    def undone(self) -> nn.Linear:
        """The module as an ordinary one."""
        return self.ordinary(nn.Parameter(self.weight.detach().to_dense()))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().to_dense()


def semi_structured(model: PreTrainedModel) -> PreTrainedModel:
    """Stores what `fits` among the weights of a model on CUDA as semi-structured matrices; see `speed_up`."""
    if torch.cuda.get_device_capability(next(model.base_model.parameters()).device) < _CAPABILITY:
        warnings.warn("speed_up: the model stays as it is: this GPU has no sparse tensor cores", stacklevel=3)
        return model
    found = False
    for module in model.base_model.modules():
        if type(module) is nn.Linear and fits(module.weight):
            sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(sparse, requires_grad=False)
            module.__class__ = SemiStructuredLinear
        found |= type(module) is SemiStructuredLinear
    if not found:
        warnings.warn(
            "speed_up: the model stays as it is: no matrix has two zeros in every four weights; prune with "
            '`granularity: "2:4"`, or run it on a CPU',
            stacklevel=3,
        )
    return model


def fits(weight: Tensor) -> bool:
    """Whether torch's kernels take a weight: half precision, contiguous, multiples of 32 and 64, at most 2 non-zeros in every 4."""
    rows, columns = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16) or not weight.is_contiguous():
        return False
    if not weight.numel() or rows % _ROWS or columns % _COLUMNS:
        return False
    return bool(torch.count_nonzero(weight.detach().view(-1, 4), dim=1).max() <= 2)
