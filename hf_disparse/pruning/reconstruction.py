"""Refits the remaining weights of each matrix by least squares to its outputs before pruning, without a backward pass.

It goes layer by layer. The inputs come from the encoder as pruned so far, the target outputs from the encoder before pruning,
so that a matrix also makes up for the losses of earlier layers.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from hf_disparse.config import UserError
from hf_disparse.pruning.scores import Average, Batch, LossFunction, evaluating

_LAYER = re.compile(r"(?P<list>.+?)\.(?P<number>\d+)\.(?P<linear>.+)\.weight")
DAMPING = 0.01
Calls = dict[nn.Module, list[tuple[Tensor, Tensor]]]


def damped(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """H + d and d = damping * mean(diag H), which is above 0 even if all inputs are zero. Shapes: (in, in) -> (in, in), ()."""
    strength = damping * gram.diagonal().mean().clamp_min(1e-12)
    return gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), strength


def fit(gram: Tensor, cross: Tensor, weight: Tensor, keep: Tensor, damping: float = DAMPING) -> Tensor:
    """The W, zero where `keep` is False, that minimises |X W^T - Y|^2 + d |W - weight|^2, d = damping * mean(diag(X^T X)).

    Each row is solved on its own, over the columns M that it keeps: w_M = (X_M^T X_M + d)^-1 (X_M^T y + d weight_M). Rows that
    keep the same columns, as after pruning heads or neurons, share the Cholesky factor of X_M^T X_M + d.
    Source: SparseGPT, Frantar and Alistarh 2023 (arXiv 2301.00774), eq. 2 with its dampening, here towards the weight.

    Shapes: gram X^T X (in, in), cross X^T Y (in, out), weight and keep (out, in) -> (out, in); float64, `keep` bool.
    """
    gram, strength = damped(gram, damping)
    cross = cross + strength * weight.T
    alike: dict[bytes, list[int]] = {}
    for row, columns in enumerate(keep.cpu().numpy()):
        alike.setdefault(columns.tobytes(), []).append(row)
    fitted = torch.zeros_like(weight)
    for rows in alike.values():
        own = keep[rows[0]].nonzero()  # (columns, 1)
        these = torch.tensor(rows, device=own.device)
        root = torch.linalg.cholesky(gram[own, own.T])
        fitted[these, own] = torch.cholesky_solve(cross[own, these], root)
    return fitted


@dataclass
class Call:
    """How the model calls one of its layers for one batch, apart from the hidden states."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: dict[str, Any]
    real: Tensor | None  # (batch, tokens), False for padding

    def run(self, layer: nn.Module, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Runs the layer on hidden states, with `weights` instead of its own if given."""
        args, kwargs = (hidden, *self.args[1:]), self.kwargs
        if not self.args:
            args, kwargs = (), {**kwargs, "hidden_states": hidden}
        with torch.autocast(**self.autocast):
            return _first(functional_call(layer, weights, args, kwargs) if weights else layer(*args, **kwargs))

    def rows(self, calls: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of a module as (rows, width), at least float32, without padding."""
        return tuple(torch.cat([self._unpadded(states) for states in side]) for side in zip(*calls, strict=True))

    def _unpadded(self, states: Tensor) -> Tensor:
        is_by_token = self.real is not None and states.shape[:-1] == self.real.shape
        rows = states[self.real] if is_by_token else states.flatten(0, -2)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


@torch.no_grad()
def check(model: nn.Module, names: Iterable[str], batch: Batch, loss_fn: LossFunction) -> None:
    """Raises now what `reconstruct` would raise for masks of these weights; takes one forward pass."""
    layers = [layer for layer, _ in _layers(model, names)]
    with evaluating(model):
        _record(model, layers, [batch], loss_fn)


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    loss_fn: LossFunction,
    average: Average | None = None,
    progress: bool = False,
) -> None:
    """Fits the weights that `masks` keep, and their biases, in place, to the outputs of the matrices before pruning.

    Takes about seven forward passes over the batches, and memory for two hidden states of each batch.

    Args:
        masks: {name: (out, in) bool} of Linear weights in the layers of `model`, which are already zero where it is False.
        before: {name: (out, in)}, the same weights before pruning.
        loss_fn: (model, batch) -> loss; called for its forward pass.
        average: averages tensors over processes in place; each process has its part of the batches.
        progress: show a bar over the layers.

    Raises:
        UserError: no batches, a model that does not pass hidden states from layer to layer as transformers' encoders do, or
            layers that share a matrix.
    """
    if not batches:
        raise UserError("pruning.reconstruct: there are no batches to fit the matrices on")
    layers = _layers(model, masks)
    with evaluating(model):
        hidden, calls = _record(model, [layer for layer, _ in layers], batches, loss_fn)
        pruned = list(hidden)
        bar = tqdm(layers, desc="fitting layers", disable=not progress, leave=False)
        for number, (layer, linears) in enumerate(bar):
            modules = {layer.get_submodule(name): name for name in linears}
            whole = {f"{name}.weight": before[full] for name, full in linears.items()}
            whole |= {f"{name}.bias": m.bias.clone() for m, name in modules.items() if m.bias is not None}
            streams = [(call[number], now, then) for call, now, then in zip(calls, pruned, hidden, strict=True)]
            for times, group in _groups(_watch(modules, calls[0][number].run, layer, pruned[0])):
                keep = {module: masks[linears[modules[module]]] for module in group}
                _fit(layer, keep, times, whole, streams, average)
            for i, call in enumerate(calls if number < len(layers) - 1 else ()):
                hidden[i] = call[number].run(layer, hidden[i], whole)
                pruned[i] = call[number].run(layer, pruned[i])


def _fit(
    layer: nn.Module,
    keep: Mapping[nn.Module, Tensor],
    times: int,
    whole: Mapping[str, Tensor],
    streams: Iterable[tuple[Call, Tensor, Tensor]],
    average: Average | None,
) -> None:
    """Fits Linear modules that share their inputs and are called `times` times in one run of the layer.

    Args:
        streams: (call, hidden states that enter the layer now, and before pruning), batch by batch.
    """
    sums: list[Tensor] = []
    for call, now, then in streams:
        first = next(iter(keep))
        rows, _ = call.rows(_watch([first], call.run, layer, now, until=times)[first])
        wanted = _watch(keep, call.run, layer, then, whole, until=times * len(keep))
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)  # for the bias
        products = [rows.T @ rows, *(rows.T @ call.rows(wanted[module])[1] for module in keep)]
        sums = [a + b for a, b in zip(sums, products, strict=True)] if sums else [p.double() for p in products]
    if average is not None:
        average(sums)
    gram, *crosses = sums
    for (module, kept), cross in zip(keep.items(), crosses, strict=True):
        weight = module.weight.double()
        if module.bias is None:
            module.weight.copy_(fit(gram[:-1, :-1], cross[:-1], weight, kept))
            continue
        both = torch.cat([weight, module.bias.double()[:, None]], 1)
        fitted = fit(gram, cross, both, torch.cat([kept, kept.new_ones(len(kept), 1)], 1))
        module.weight.copy_(fitted[:, :-1])
        module.bias.copy_(fitted[:, -1])


def _layers(model: nn.Module, masks: Iterable[str]) -> list[tuple[nn.Module, dict[str, str]]]:
    """All layers of the encoder, in order, each with {name in the layer: name of the weight} of its masked matrices."""
    found = {name: _LAYER.fullmatch(name) for name in masks}
    lists = {match["list"] if match else None for match in found.values()}
    if None in lists or len(lists) > 1:
        odd = next((name for name, match in found.items() if match is None), f"{len(lists)} lists of layers")
        raise UserError(f"pruning.reconstruct: all pruned matrices must be in the layers of one encoder; got {odd}")
    layers = [(layer, {}) for layer in model.get_submodule(lists.pop())]
    uses = Counter(id(p) for layer, _ in layers for _, p in layer.named_parameters(remove_duplicate=False))
    for name in found:
        if uses[id(model.get_parameter(name))] > 1:
            raise UserError(f"pruning.reconstruct: {name} is shared with another module, so it cannot be fitted")
    for name, match in found.items():
        layers[int(match["number"])][1][match["linear"]] = name
    return layers


def _record(
    model: nn.Module, layers: Sequence[nn.Module], batches: Iterable[Batch], loss_fn: LossFunction
) -> tuple[list[Tensor], list[list[Call]]]:
    """Records the hidden states that enter the first layer, by batch, and the calls of the layers, by batch and layer."""
    hidden, calls = [], []
    for batch in batches:
        inputs, outputs, made = [], [], []
        real = batch.get("attention_mask")

        def before(layer, args, kwargs, inputs=inputs, made=made, real=real):
            inputs.append(args[0] if args else kwargs["hidden_states"])
            device = inputs[-1].device
            autocast = {"device_type": device.type, "enabled": torch.is_autocast_enabled(device.type)}
            autocast["dtype"] = torch.get_autocast_dtype(device.type)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            mask = real.to(device).bool() if real is not None and real.ndim == 2 else None
            made.append(Call((None, *args[1:]) if args else (), rest, autocast, mask))

        def after(layer, args, output, outputs=outputs):
            outputs.append(_first(output))

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        handles += [layer.register_forward_hook(after) for layer in layers]
        try:
            loss_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        is_chain = len(inputs) == len(layers) and all(a is b for a, b in zip(inputs[1:], outputs[:-1], strict=True))
        if not is_chain:
            raise UserError(
                "pruning.reconstruct: the layers of the encoder must follow one another directly, once each; "
                f"those of {type(model).__name__} do not"
            )
        hidden.append(inputs[0])
        calls.append(made)
    return hidden, calls


class _Enough(Exception):
    """Stops a run once all wanted calls have been seen."""


def _watch(modules: Iterable[nn.Module], run: Callable[..., Any], *arguments: Any, until: int | None = None) -> Calls:
    """Module -> (input, output) of each of its calls in `run(*arguments)`, modules in the order of their first calls.

    Args:
        until: stop `run` after this many calls in all.
    """
    seen: Calls = {}

    def see(module, args, output):
        seen.setdefault(module, []).append((args[0], output))
        if sum(map(len, seen.values())) == until:
            raise _Enough

    handles = [module.register_forward_hook(see) for module in modules]
    try:
        run(*arguments)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _groups(seen: Calls) -> list[tuple[int, list[nn.Module]]]:
    """(number of calls, modules that share their inputs), in the order of the first calls."""
    groups: dict[tuple[int, ...], list[nn.Module]] = {}
    for module, calls in seen.items():
        groups.setdefault(tuple(id(given) for given, _ in calls), []).append(module)
    return [(len(inputs), modules) for inputs, modules in groups.items()]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
