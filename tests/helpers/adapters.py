"""Sparse models with PEFT adapters on some tasks, and what of them has to stay as it was."""

import pytest
import torch

from hf_disparse import (
    MultitaskConfig,
    MultitaskModel,
    apply_masks,
    prunable_parameters,
)
from tests.helpers.compacting import BATCH, close
from tests.helpers.tiny import CONFIGS, three_tasks
from tests.helpers.training import assert_same, weights

peft = pytest.importorskip("peft", reason="pip install 'hf_disparse[peft]'")

TARGETS = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"]}

KINDS = {
    "lora": lambda **kw: peft.LoraConfig(**{"r": 2, **kw}),
    "ia3": lambda **kw: peft.IA3Config(**{"feedforward_modules": [], **kw}),
    "hira": lambda **kw: peft.HiraConfig(**{"r": 2, **kw}),
    "shira": lambda **kw: peft.ShiraConfig(**{"r": 1, "random_seed": 1, **kw}),
}

KIND = pytest.mark.parametrize("kind", KINDS)

TWO = dict(columns="text", labels=["no", "yes"])


def config_of(kind: str, **kw) -> peft.PeftConfig:
    return KINDS[kind](**{"target_modules": TARGETS["bert"], **kw})


def sparse_model(model_type: str = "bert", tasks=None, sparsity: float = 0.6) -> MultitaskModel:
    torch.manual_seed(0)
    model = MultitaskModel(MultitaskConfig(encoder_config=CONFIGS[model_type](), tasks=tasks or three_tasks()))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if sparsity:
        apply_masks(model, {n: torch.rand(p.shape) > sparsity for n, p in prunable_parameters(model).items()})
    return model.eval()


def train_by_hand(model: MultitaskModel) -> MultitaskModel:
    """Adapters that do something: they start as ones that do nothing."""
    for parameter in model.encoder.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model


def adapted(kind: str, names=("two", "three"), **kw) -> MultitaskModel:
    model = sparse_model(**kw)
    for task in names:
        model.add_adapter(config_of(kind, target_modules=TARGETS[kw.get("model_type", "bert")]), task)
    return train_by_hand(model)


def by_task(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {task: model(**BATCH, task=task).logits for task in model.heads}


def all_close(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for task, expected in first.items():
        close(second[task], expected)


def of_peft(model) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]


def adapter(model, task: str) -> dict[str, torch.Tensor]:
    """Its tensors by PEFT's own function."""
    state = peft.get_peft_model_state_dict(model.encoder, adapter_name=task)
    return {name: tensor.clone() for name, tensor in state.items()}


def state(model) -> tuple[dict, tuple, dict]:
    """All that a refused call must leave as it was: bits and logits, and what compares by ==."""
    flags = {n: (p.requires_grad, p.device.type) for n, p in model.named_parameters()}
    adapters = {task: config.to_dict() for task, config in model.adapters.items()}
    training = {name: module.training for name, module in model.named_modules()}
    return weights(model), (flags, adapters, training, model.config.to_dict()), by_task(model)


def assert_unchanged(model, before) -> None:
    after = state(model)
    assert_same(before[0], after[0])
    assert before[1] == after[1]
    all_close(before[2], after[2])
