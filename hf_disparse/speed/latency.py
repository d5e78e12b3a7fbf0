"""What parts and zeros cost in time on this machine: a table, measured on layers of the model's own shape.

The time of an encoder is that of the smallest one, with one head and one neuron in each layer, plus what each layer's further
heads and neurons take:

    t = t_least + sum over layers of a(heads, zeros) + f(neurons, zeros)
"""

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_disparse.fast.speed_up import fuse, speed_up
from hf_disparse.model.architectures import encoder_layers, find_sites, layout_of
from hf_disparse.model.structure import Cuts, keep_parts

KINDS = ("head", "neuron")
ZEROS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)  # fractions of zeros that a runtime which gains by them is measured at
_GRID = {"head": (0.25, 0.5, 0.75, 1.0), "neuron": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)}  # fractions of a layer's parts
_SECONDS, _ROUNDS = 0.15, 40  # for each measurement, and passes of it at most
_PASS = 0.02  # seconds: layers are repeated until a pass of a dense encoder takes about this long, but for no more than it has


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a layer's heads or neurons, beyond those of a layer with one.

    Args:
        least: seconds of the encoder with one head and one neuron in each layer.
        parts: kind -> the numbers of parts that were measured, ascending, beginning with 1.
        seconds: kind -> fraction of zeros -> seconds for each of these numbers.
    """

    least: float
    parts: dict[str, list[int]]
    seconds: dict[str, dict[float, list[float]]]

    def at(self, kind: str, parts: int, zeros: float) -> float:
        """Returns the seconds of so many parts, by linear interpolation."""
        return float(np.interp(parts, self.parts[kind], self.seconds[kind][zeros]))

    @property
    def zeros(self) -> list[float]:
        """The fractions of zeros that were measured."""
        return list(self.seconds["head"])


class Timer:
    """Times an encoder, whole or cut down, in one setting: a pass over texts of equal length, without padding.

    Args:
        encoder: on the CPU, in float32; it is not changed.
        runtime: `torch`, or `fast` for `speed_up`.
        batch, length: texts, and tokens of each.
    """

    def __init__(self, encoder: nn.Module, runtime: str, batch: int, length: int):
        self.runtime, self.layout = runtime, layout_of(encoder, "shrink")
        self.ids = torch.full((batch, length), 5 % encoder.config.vocab_size)
        self.mask = torch.ones_like(self.ids)
        self.whole = self._in_runtime(encoder)
        layers, sites = encoder_layers(encoder), find_sites(encoder)
        sizes = {kind: [site.parts for site in sites[kind].values()] for kind in KINDS}
        self.parts = {kind: max(found) for kind, found in sizes.items()}
        self._widest = {kind: layers[found.index(max(found))] for kind, found in sizes.items()}
        with _without_layers(encoder, self.layout.layers):
            self._skeleton = copy.deepcopy(encoder).eval()
        self.layers = len(layers)

    def before(self) -> float:
        """Returns the seconds of the encoder as it was given."""
        return self._least(self.whole)[0]

    def after(self, encoder: nn.Module) -> float:
        """Returns the seconds of another encoder in units of `before`, both timed in turns."""
        whole, other = self._least(self.whole, self._in_runtime(encoder))
        return other / whole

    def of_layers(self, copies: int, zeros: float, **parts: int) -> float:
        """Returns the seconds of an encoder of `copies` layers with so many heads and neurons and this fraction of zeros."""
        widest = self._widest[max(parts, key=parts.get)]
        shared = {id(p): p for p in self._skeleton.parameters()}  # the embeddings
        encoder = copy.deepcopy(self._skeleton, shared)
        encoder.config.num_hidden_layers = copies
        layers = encoder.get_submodule(self.layout.layers)
        layers.extend(copy.deepcopy(widest) for _ in range(copies))
        for kind, number in parts.items():
            for name, site in find_sites(encoder)[kind].items():
                keep_parts(encoder, self.layout, kind, name, site, torch.arange(site.parts) < number, Cuts(None))
        generator = torch.Generator().manual_seed(0)
        for linear in layers.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data = _random(linear.weight.shape, zeros, generator)
        if self.runtime == "fast":
            fuse(encoder)
        return self._least(encoder)[0]

    def _in_runtime(self, encoder: nn.Module) -> nn.Module:
        encoder = copy.deepcopy(encoder).eval()
        if self.runtime == "fast":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an encoder that does not gain stays as it is
                speed_up(encoder)
        return encoder

    @torch.inference_mode()
    def _least(self, *encoders: nn.Module) -> list[float]:
        """Returns the least seconds of a pass through each encoder; they take turns."""
        # One thread's own time: other work on the machine, which makes it wait, does not count.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        least, begin = [float("inf")] * len(encoders), time.perf_counter()
        for number in range(_ROUNDS):
            for place, encoder in enumerate(encoders):
                start = clock()
                encoder(input_ids=self.ids, attention_mask=self.mask)
                least[place] = min(least[place], clock() - start)
            if number > 1 and time.perf_counter() - begin > _SECONDS * len(encoders):
                break
        return least


def measure_table(timer: Timer, progress: bool = False) -> LatencyTable:
    """Measures what heads, neurons and zeros cost in time; takes up to a minute.

    A layer has one head while neurons are measured, and one neuron while heads are. Layers are repeated where one is too quick
    to be measured well.
    """
    levels = ZEROS if timer.runtime == "fast" else (0.0,)
    grid = {kind: sorted({1, *(max(1, round(share * timer.parts[kind])) for share in _GRID[kind])}) for kind in KINDS}
    least = timer.of_layers(timer.layers, 0.0, head=1, neuron=1)
    copies = max(1, min(timer.layers, round(_PASS / timer.of_layers(1, 0.0, head=1, neuron=timer.parts["neuron"]))))
    points = [(kind, zeros, number) for kind in KINDS for zeros in levels for number in grid[kind]]
    bar = tqdm(points, desc=f"timing layers in {timer.runtime}", disable=not progress, leave=False)
    taken = {
        (kind, zeros, number): timer.of_layers(copies, zeros, **{"head": 1, "neuron": 1, kind: number})
        for kind, zeros, number in bar
    }
    smallest = min(taken.values())

    def of_layer(kind: str, zeros: float) -> list[float]:
        beyond = [(taken[kind, zeros, number] - smallest) / copies for number in grid[kind]]
        return np.maximum.accumulate(beyond).tolist()  # more parts are never faster; noise may say so

    return LatencyTable(least, grid, {kind: {zeros: of_layer(kind, zeros) for zeros in levels} for kind in KINDS})


@contextmanager
def _without_layers(encoder: nn.Module, name: str) -> Iterator[None]:
    """Takes the layers out of an encoder for a while."""
    parent, _, last = name.rpartition(".")
    holder, layers = encoder.get_submodule(parent), encoder.get_submodule(name)
    setattr(holder, last, nn.ModuleList())
    try:
        yield
    finally:
        setattr(holder, last, layers)


def _random(shape: torch.Size, zeros: float, generator: torch.Generator) -> Tensor:
    """Small random weights, of which this fraction is zero."""
    weight = 0.02 * torch.randn(shape, generator=generator)
    return weight.masked_fill_(torch.rand(shape, generator=generator) < zeros, 0.0)
