"""Re-initialise and retrain: the architecture that pruning found, with fresh weights."""

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel


def reinitialise(encoder: PreTrainedModel, seed: int, optimizer: Optimizer | None = None) -> None:
    """Initialises all weights of the encoder again, as its architecture does, and clears their optimizer state.

    The same seed gives the same weights; global random state is not touched. Pruned weights are initialised too, so apply
    the masks afterwards. Source: Garg et al. 2023 (arXiv 2304.06840).
    """
    for loaded in (*encoder.modules(), *encoder.parameters(), *encoder.buffers()):
        loaded._is_hf_initialized = False  # transformers skips what it has marked as loaded
    with torch.random.fork_rng(sorted({p.device for p in encoder.parameters() if p.is_cuda}, key=str)):
        torch.manual_seed(seed)
        encoder.initialize_weights()
    for parameter in encoder.parameters() if optimizer else ():
        optimizer.state.pop(parameter, None)
