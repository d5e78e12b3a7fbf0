"""Small encoders of every architecture with whole heads and neurons pruned, and comparisons of their outputs."""

import torch

from hf_disparse import MultitaskConfig, MultitaskModel, apply_masks, find_masks
from hf_disparse.model.architectures import find_sites
from hf_disparse.pruning.parts import mask_of_parts
from tests.helpers.tiny import CONFIGS, three_tasks

BATCH = {
    "input_ids": torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 10, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}


def model_of(model_type: str, **kwargs) -> MultitaskModel:
    torch.manual_seed(0)
    config = CONFIGS[model_type]()
    config.num_hidden_layers = 3
    config.num_attention_heads = 4
    if model_type == "modernbert":
        config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    model = MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks(), **kwargs))
    for parameter in model.parameters():  # biases and norms that are not at their start, so that forgetting one shows
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prune_parts(model, kinds=("head", "neuron"), even: bool = False, seed: int = 0) -> dict[str, int]:
    """Zeroes random parts, a different number in each layer unless `even`; returns how many stay."""
    generator, stay = torch.Generator().manual_seed(seed), dict.fromkeys(kinds, 0)
    encoder = model.base_model
    masks = find_masks({n: torch.ones_like(p) for n, p in encoder.named_parameters() if p.ndim == 2})
    for kind in kinds:
        for i, site in enumerate(find_sites(encoder)[kind].values()):
            number = site.parts // 2 if even else 1 + (2 * i + 1) % max(site.parts - 1, 1)
            keep = torch.zeros(site.parts, dtype=torch.bool)
            keep[torch.randperm(site.parts, generator=generator)[:number]] = True
            masks |= mask_of_parts(masks, site, keep)
            stay[kind] += number
    apply_masks(encoder, masks)
    return stay


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**BATCH, task=task, **kwargs).logits.flatten() for task in model.tasks])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order of summation."""
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def same(a: MultitaskModel, b: MultitaskModel) -> None:
    """The same weights to the bit; sums may still run in another order, by where the weights lie in memory."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    close(logits(a), logits(b))
