"""Re-initialise and retrain: the architecture that pruning found, with weights that know nothing."""

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel


def reinitialise(encoder: PreTrainedModel, seed: int, optimizer: Optimizer | None = None) -> None:
    """Draws all weights of the encoder anew, as its architecture initialises them; the optimizer forgets them.

    The same seed gives the same weights, and the global generators stay as they are. Pruned weights are drawn, too: apply
    the masks afterwards. Source: Garg et al. 2023 (arXiv 2304.06840).
    """
    for thing in (*encoder.modules(), *encoder.parameters(), *encoder.buffers()):
        thing._is_hf_initialized = False  # transformers' mark of what it loaded, which it does not draw again
    with torch.random.fork_rng(sorted({p.device for p in encoder.parameters() if p.is_cuda}, key=str)):
        torch.manual_seed(seed)
        encoder.initialize_weights()
    for parameter in encoder.parameters() if optimizer else ():
        optimizer.state.pop(parameter, None)
