"""Tasks with upper layers of their own on the shared encoder. Layer 2.

Where tasks disagree (the watershed of DiSparse, Sun et al. 2022, arXiv 2206.04662; TAPS, Wallingford et al. 2022, arXiv
2203.16708, learns the place) they stop sharing: `encoder.private[task]` holds copies of the encoder's layers from some place
on. While the task runs, they and the encoder's change places, and transformers' own forward does the rest.
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
    """The part of `MultitaskModel` that has to do with layers of single tasks; expects `encoder`, `heads`, `config`."""

    def make_private(self) -> None:
        """Makes the private layers that the configuration lists anew, as copies of the encoder's.

        Raises:
            UserError: a configuration that does not fit, before any memory is taken.
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
        # In the order of the heads: that of a file's keys may be another. Private layers are part of the encoder, so that
        # transformers finds them when it records hidden states.
        private = {task: layers[wanted[task] :] for task in self.heads if task in wanted}
        setattr(
            self.encoder, PRIVATE, nn.ModuleDict({task: _copies(self.encoder, own) for task, own in private.items()})
        )

    @contextmanager
    def layers_of(self, task: str | None) -> Iterator[None]:
        """While it lasts, the encoder is that of `task`, with its own layers if it has some."""
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
        """Drops the task's own layers: those of the encoder serve it as they are."""
        del self.encoder.private[task]
        self.config.unshared = {name: first for name, first in self.config.unshared.items() if name != task}
        if not self.config.unshared:
            delattr(self.encoder, PRIVATE)

    def settle(self) -> None:
        """Where no task is left that shares all layers, the one that shares most gives its own to the encoder."""
        if self.config.unshared and set(self.config.unshared) >= set(self.heads):
            task = max(self.heads, key=self.config.unshared.get)
            self._exchange(task)
            self.share_again(task)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The encoder's parameters without those of single tasks."""
        return (p for name, p in self.encoder.named_parameters() if not name.startswith(f"{PRIVATE}."))


def unshare(model: UnsharedLayers, layer: int, tasks: Sequence[str] | None = None) -> None:
    """Gives tasks a copy of their own of the encoder's layers from `layer` on, in place; at first the logits stay the same.

    `save_pretrained` and `from_pretrained` know them, the exports of a task take them. Such a task costs a pass of the encoder of
    its own, and the memory of its layers. Prune first: masks are held, but nothing is decided on an encoder that is shared
    in part. Make the Trainer afterwards, for its optimizer holds the model's parameters.

    Args:
        model: a MultitaskModel without adapters.
        layer: the first that is not shared, counted from 0.
        tasks: those that get one; by default all that share all layers. Where no task would be left that uses the
            encoder's, the first one keeps these as its own.

    Raises:
        UserError: no such layer or task, one that has its own layers already, a model with one task or with adapters,
            an encoder whose layers are not known.
    """
    heads, unshared = model.heads, model.config.unshared
    if len(heads) < 2:
        raise UserError(f"unshare: expected a model with several tasks, got one with {', '.join(heads)} alone")
    if model.adapters:
        raise UserError(
            f"unshare: expected a model without adapters, got one with those of {', '.join(model.adapters)}"
        )
    names = [task for task in heads if task not in unshared] if tasks is None else list(tasks)
    free = [task for task in heads if task not in unshared]
    if isinstance(tasks, str) or not names or not set(names) <= set(free):
        raise UserError(f"tasks: expected a list of those that share all layers, {', '.join(free)}, got {tasks!r}")
    layers = encoder_layers(model.encoder, "unshare")
    if type(layer) is not int or not 0 <= layer < len(layers):
        raise UserError(f"layer: expected one of the encoder's {len(layers)}, 0 to {len(layers) - 1}, got {layer!r}")
    skipped = model.config.skipped_layers
    model.skip_layers([])  # so that the hooks of this are not copied
    own = dict(model.encoder.private.items()) if unshared else {}
    own |= {task: _copies(model.encoder, layers[layer:]) for task in names}
    model.encoder.private = nn.ModuleDict({task: own[task] for task in heads if task in own})
    model.config.unshared = {**unshared, **dict.fromkeys(names, layer)}
    model.settle()
    model.skip_layers(skipped)


def shared_name(encoder: nn.Module, name: str) -> str:
    """The name within the encoder that a module or parameter of a private layer is a copy of; that of another one itself."""
    parts = name.split(".")
    if parts[0] != PRIVATE or not hasattr(encoder, PRIVATE):
        return name
    layers, own = layout_of(encoder).layers, encoder.private[parts[1]]
    first = len(encoder.get_submodule(layers)) - len(own)
    return ".".join([layers, str(first + int(parts[2])), *parts[3:]])


def _copies(encoder: PreTrainedModel, layers: nn.ModuleList) -> nn.ModuleList:
    """Copies of layers that refer to the very configurations that the originals refer to."""
    configs = {
        id(c): c for c in (getattr(m, "config", None) for m in encoder.modules()) if isinstance(c, PreTrainedConfig)
    }
    return nn.ModuleList([copy.deepcopy(layer, dict(configs)) for layer in layers])
