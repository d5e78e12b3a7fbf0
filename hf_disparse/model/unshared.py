"""Tasks with upper layers of their own on the shared encoder.

Where tasks disagree (the watershed of DiSparse, Sun et al. 2022, arXiv 2206.04662; TAPS, Wallingford et al. 2022, arXiv
2203.16708, learns the place) they stop sharing: `encoder.private[task]` holds copies of the encoder's layers from that depth
on. While the task runs they swap places with the encoder's, and transformers' own forward does the rest.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_disparse.config import UserError
from hf_disparse.model.architectures import encoder_layers, layout_of

PRIVATE = "private"


class UnsharedLayers:
    """Mixin of `MultitaskModel` for layers of single tasks; expects `encoder`, `heads` and `config`."""

    def make_private(self) -> None:
        """Creates the private layers that the configuration lists, as copies of the encoder's.

        Raises:
            UserError: the configuration does not fit; checked before memory is allocated.
        """
        wanted = self.config.unshared
        if not isinstance(wanted, dict):
            raise UserError(f"unshared: expected a mapping of tasks to layers, got {str(wanted)[:100]}")
        if hasattr(self.encoder, PRIVATE):
            delattr(self.encoder, PRIVATE)
        if not wanted:
            return
        layers = encoder_layers(self.encoder, "unshare")
        for task, first in wanted.items():
            if task not in self.heads or type(first) is not int or not 0 <= first < len(layers):
                got = f"{str(task)[:50]}: {str(first)[:50]}"
                raise UserError(f"unshared: expected tasks and the first of {len(layers)} layers of each, got {got}")
        # In the order of the heads, because a file may order its keys differently. Private layers are part of the encoder,
        # so that transformers finds them when it records hidden states.
        private = {task: layers[wanted[task] :] for task in self.heads if task in wanted}
        setattr(
            self.encoder, PRIVATE, nn.ModuleDict({task: _copies(self.encoder, own) for task, own in private.items()})
        )

    @contextmanager
    def layers_of(self, task: str | None) -> Iterator[None]:
        """Within this context, the encoder runs with the own layers of `task`, if it has any."""
        if task not in self.config.unshared:
            yield
            return
        self._exchange(task)
        try:
            yield
        finally:
            self._exchange(task)

    def _exchange(self, task: str) -> None:
        layers, own = encoder_layers(self.encoder, "unshare"), self.encoder.private[task]
        first = len(layers) - len(own)
        for i, layer in enumerate(list(own)):
            own[i], layers[first + i] = layers[first + i], layer

    def share_again(self, task: str) -> None:
        """Drops the task's own layers; it uses the encoder's again."""
        del self.encoder.private[task]
        self.config.unshared = {name: first for name, first in self.config.unshared.items() if name != task}
        if not self.config.unshared:
            delattr(self.encoder, PRIVATE)

    def settle(self) -> None:
        """If no task shares all layers any more, moves the layers of the task that shares most into the encoder."""
        if self.config.unshared and set(self.config.unshared) >= set(self.heads):
            task = max(self.heads, key=self.config.unshared.get)
            self._exchange(task)
            self.share_again(task)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The encoder's parameters, except those of private layers."""
        return (p for name, p in self.encoder.named_parameters() if not name.startswith(f"{PRIVATE}."))


def unshare(model: UnsharedLayers, layer: int, tasks: Sequence[str] | None = None) -> None:
    """Gives each task its own copy of the encoder's layers from `layer` on, in place; the logits do not change yet.

    The copies are saved, loaded and exported with the model. Each such task costs its own pass of the encoder, and the memory
    of its layers. Prune first: masks are held, but a partly shared encoder cannot be pruned further. Create the Trainer
    afterwards, because its optimizer holds the model's parameters.

    Args:
        model: a MultitaskModel without adapters.
        layer: index of the first layer that is not shared.
        tasks: the tasks that get copies; by default all that share all layers. If no task would be left on the encoder's
            own layers, the first one keeps them.

    Raises:
        UserError: there is no such layer or task, a task has its own layers already, the model has a single task or
            adapters, or the encoder's layers are not known.
    """
    heads, unshared = model.heads, model.config.unshared
    if len(heads) < 2:
        raise UserError(f"unshare: expected a model with several tasks, got one with only {', '.join(heads)}")
    if model.adapters:
        raise UserError(
            f"unshare: expected a model without adapters, got one with those of {', '.join(model.adapters)}"
        )
    names = [task for task in heads if task not in unshared] if tasks is None else list(tasks)
    free = [task for task in heads if task not in unshared]
    if isinstance(tasks, str) or not names or not set(names) <= set(free):
        raise UserError(f"tasks: expected a list of tasks that share all layers, {', '.join(free)}, got {tasks!r}")
    layers = encoder_layers(model.encoder, "unshare")
    if type(layer) is not int or not 0 <= layer < len(layers):
        raise UserError(f"layer: expected one of the encoder's {len(layers)}, 0 to {len(layers) - 1}, got {layer!r}")
    skipped = model.config.skipped_layers
    model.skip_layers([])  # so that its hooks are not copied
    own = dict(model.encoder.private.items()) if unshared else {}
    own |= {task: _copies(model.encoder, layers[layer:]) for task in names}
    model.encoder.private = nn.ModuleDict({task: own[task] for task in heads if task in own})
    model.config.unshared = {**unshared, **dict.fromkeys(names, layer)}
    model.settle()
    model.skip_layers(skipped)


def shared_name(encoder: nn.Module, name: str) -> str:
    """The encoder's name for what a private module or parameter is a copy of; other names are returned unchanged."""
    parts = name.split(".")
    if parts[0] != PRIVATE or not hasattr(encoder, PRIVATE):
        return name
    layers, own = layout_of(encoder).layers, encoder.private[parts[1]]
    first = len(encoder.get_submodule(layers)) - len(own)
    return ".".join([layers, str(first + int(parts[2])), *parts[3:]])


def _copies(encoder: PreTrainedModel, layers: nn.ModuleList) -> nn.ModuleList:
    """Copies layers, but shares the configuration objects with the originals."""
    configs = {
        id(c): c for c in (getattr(m, "config", None) for m in encoder.modules()) if isinstance(c, PreTrainedConfig)
    }
    return nn.ModuleList([copy.deepcopy(layer, dict(configs)) for layer in layers])
