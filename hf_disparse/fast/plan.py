"""From the modules of an encoder to the structs that C runs, checked anew at every call.

The fused path does not call the modules inside an encoder. So each call looks whether they are still what was read: the same
modules and parameters, without hooks. What has changed is read again, or the call goes to transformers' own forward.
"""

import ctypes
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from hf_disparse.fast import structs
from hf_disparse.fast.families import Family, activation_module, activation_of
from hf_disparse.fast.linear import FastLinear

_LANES = 64  # as in fast.h
_KNOWN = ("transformers.", "torch.nn.modules.", "hf_disparse.")  # where the classes are defined whose forward is known


class Unfit(Exception):
    """The fused path cannot run these modules as they are; transformers' forward can."""


class Watch:
    """Notices whether modules that are not called would do something else if they were."""

    def __init__(self, root: nn.Module, but: tuple[nn.Module, ...] = ()):
        inside = {id(m) for other in but for m in other.modules()}
        self.modules = [m for m in root.modules() if id(m) not in inside]
        if unknown := next((m for m in self.modules if not type(m).__module__.startswith(_KNOWN)), None):
            raise Unfit(f"{type(unknown).__name__} is the user's")
        self.children = [(m._modules, tuple(m._modules.values())) for m in self.modules if m._modules]

    def check(self) -> None:
        """Raises Unfit if a module was replaced, hooked or given another forward."""
        for children, before in self.children:
            if tuple(children.values()) != before:
                raise Unfit("a module was replaced")
        for module in self.modules:
            if module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
                hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
                if "forward" in module.__dict__ or not all(_is_known(hook) for hook in hooks):
                    raise Unfit(f"{type(module).__name__} has hooks or another forward")


def _is_known(hook: Any) -> bool:
    """Whether the fused path does what this hook does, or transformers has left it behind, to record outputs when asked."""
    return hasattr(hook, "fast_path") or getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


class _Source:
    """Reads the parameters of some modules, and tells when they are others than before."""

    def __init__(self) -> None:
        self.slots: list[tuple[dict, str]] = []
        self.copied: list[tuple[dict, str]] = []  # parameters of which C reads something computed from them
        self.linears: list[FastLinear] = []

    def norm(self, module: nn.Module, features: int) -> structs.Norm:
        """What C reads of a LayerNorm or Identity."""
        if isinstance(module, nn.Identity):
            return structs.Norm(None, None, 0)
        if not isinstance(module, nn.LayerNorm) or module.normalized_shape != (features,) or module.weight is None:
            raise Unfit(f"{type(module).__name__} is not a LayerNorm with weights")
        return structs.Norm(
            self._tensor(module, "weight", features), self._tensor(module, "bias", features), module.eps
        )

    def matrix(self, module: nn.Module) -> structs.Matrix:
        """What C reads of a FastLinear."""
        if not isinstance(module, FastLinear):
            raise Unfit(f"{type(module).__name__} is not a Linear")
        self.linears.append(module)
        struct = module.matrix.struct()
        struct.bias = self._tensor(module, "bias", module.matrix.rows)
        return struct

    def table(self, module: nn.Module, size: int) -> int:
        """Where an embedding's rows are."""
        if type(module) is not nn.Embedding or module.max_norm is not None:
            raise Unfit(f"{type(module).__name__} is not a plain Embedding")
        return self._tensor(module, "weight", len(module.weight), size)

    def _tensor(self, module: nn.Module, name: str, *shape: int) -> int | None:
        self.slots.append((module._parameters, name))
        if name not in module._parameters:
            raise Unfit(f"{type(module).__name__}.{name} is computed")
        tensor = module._parameters[name]
        if tensor is not None and (
            tensor.dtype != torch.float32
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
            or tensor.shape != shape
        ):
            raise Unfit(f"{type(module).__name__}.{name} is not {shape} in float32 on the CPU")
        return structs.address(tensor)

    def state(self) -> list:
        """Changes if a parameter or matrix is exchanged; new values in the same place need no new structs."""
        tensors = (slot.get(name) for slot, name in self.slots)  # a parametrization takes a parameter away
        copied = [slot[name].detach().cpu().float().numpy().tobytes() for slot, name in self.copied]
        pointers = [t if t is None else (t.data_ptr(), t.dtype) for t in tensors]
        return [*pointers, *copied, *(linear.matrix for linear in self.linears)]


class _Plan:
    """A struct made from modules by `read`, made again when the parameters are others; threads may share it."""

    _made: tuple[_Source, list, Any] | None = None

    def struct(self) -> Any:
        """The struct. Raises Unfit."""
        made = self._made
        if made is None or made[0].state() != made[1]:
            source = _Source()
            try:
                struct = self.read(source)
            except AttributeError as error:  # a module of another kind
                raise Unfit(str(error)) from None
            made = self._made = (source, source.state(), struct)
        return made[2]

    def read(self, source: _Source) -> Any:
        """Makes the struct, which keeps alive what it points to beyond the parameters."""
        raise NotImplementedError


class LayerPlan(_Plan):
    """One layer of the encoder."""

    def __init__(self, encoder: nn.Module, family: Family, layer: nn.Module):
        self.encoder, self.family, self.layer, self.watch = encoder, family, layer, Watch(layer)

    def check(self) -> bool:
        """Whether the layer is run; False if it passes its input on. Raises Unfit."""
        self.watch.check()
        return not any(getattr(hook, "fast_path", None) == "skip" for hook in self.layer._forward_hooks.values())

    def read(self, source: _Source) -> structs.Layer:
        """Reads the layer's matrices and norms, and what its attention adds."""
        get, family, config = self.layer.get_submodule, self.family, self.encoder.config
        if type(attrgetter(family.activation)(self.layer)) is not type(activation_module(self.encoder)):
            raise Unfit("another activation than the configuration's")
        project = [source.matrix(get(name)) for name in family.project]
        heads = project[0].rows * len(project) // 3 // head_size(config)
        made = structs.Layer(heads=heads, projections=len(project), project=(structs.Matrix * 3)(*project), window=-1)
        made.merge, made.up, made.down = (source.matrix(get(name)) for name in (family.merge, family.up, family.down))
        made.before, made.after = (source.norm(get(n), config.hidden_size) for n in (family.before, family.after))
        made.kept = self._attention(made, source)
        return made

    def _attention(self, made: structs.Layer, source: _Source) -> list[Tensor]:
        """Rotary positions, local attention and relative positions; returns the tensors that C will read."""
        config, encoder = self.encoder.config, self.encoder
        tensors = []
        if hasattr(encoder, "rotary_emb"):
            kind = self.layer.attention_type
            places = torch.arange(config.max_position_embeddings, device="cpu").unsqueeze(0)
            tensors = list(encoder.rotary_emb(torch.zeros(1, dtype=torch.float32, device="cpu"), places, kind))
            half = head_size(config) // 2
            tensors = [t[0, :, :half].float().contiguous() for t in tensors]
            made.cosines, made.sines = (structs.address(t) for t in tensors)
            if kind == "sliding_attention":
                made.window = config.sliding_window
        stack = getattr(encoder, "encoder", None)
        if hasattr(stack, "relative_attention_bias"):
            source.copied.append((stack.relative_attention_bias._parameters, "weight"))
            bias = distance_bias(stack, reach(config))
            for hook in self.layer.get_submodule(self.family.project[0].rpartition(".")[0])._forward_pre_hooks.values():
                bias = bias[hook.places].contiguous()  # the heads that a compact layer still has
            made.distance_bias = structs.address(bias)
            tensors = [bias]
        return tensors


def head_size(config: Any) -> int:
    """Features of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def reach(config: Any) -> int:
    """How far from 0 the distances of a `distance_bias` go."""
    return config.max_position_embeddings + _LANES


def distance_bias(stack: nn.Module, reach: int) -> Tensor:
    """MPNet's relative positions by distance, (heads, 2 * reach + 1), query's place - key's place from -reach on."""
    distances = torch.arange(-reach, reach + 1, device="cpu")
    buckets = stack.relative_position_bucket(-distances)  # 32 of them, whatever the configuration says
    return stack.relative_attention_bias.weight.detach()[buckets].T.contiguous()


class EncoderPlan(_Plan):
    """The encoder around its layers."""

    def __init__(self, encoder: nn.Module, family: Family):
        self.encoder, self.family = encoder, family
        self.layers: dict[nn.Module, LayerPlan] = {}
        stack = encoder.get_submodule(family.layers)
        outside = tuple(m for m in (stack, getattr(encoder, "private", None), getattr(encoder, "pooler", None)) if m)
        self.watch = Watch(encoder, outside)
        # The encoder itself is called; its pooler and private layers are looked up at every call.
        self.watch.modules.remove(encoder)
        self.watch.children = [(c, before) for c, before in self.watch.children if c is not encoder._modules]
        self.parts = [(n, m) for n, m in encoder._modules.items() if n not in ("pooler", "private")]

    def read(self, source: _Source) -> structs.Encoder:
        """Reads embeddings and norms."""
        encoder, family, config = self.encoder, self.family, self.encoder.config
        kind = activation_of(encoder)
        if kind is None:
            raise Unfit("the activation is unknown")
        names = [name for name in family.tables if hasattr(encoder.embeddings, name)]
        modules = [encoder.embeddings.get_submodule(name) for name in names]
        self.tables = [(name, len(module.weight)) for name, module in zip(names, modules, strict=True)]
        made = structs.Encoder(
            features=config.hidden_size,
            head_size=head_size(config),
            embedding_size=modules[0].embedding_dim,
            activation=kind,
            norm_first=family.norm_first,
            gated=family.norm_first,
            tables=len(modules),
            scale=head_size(config) ** -0.5,
            reach=reach(config),
        )
        for i, module in enumerate(modules):
            made.table[i] = source.table(module, made.embedding_size)
        made.embedding_norm = source.norm(encoder.get_submodule(family.embedding_norm), made.embedding_size)
        if family.norm_first:
            made.last_norm = source.norm(encoder.final_norm, made.features)
        if hasattr(encoder, "embeddings_project"):
            made.projection = ctypes.pointer(source.matrix(encoder.embeddings_project))
        return made

    def ready(self) -> structs.Encoder:
        """The encoder with the layers that it has now. Raises Unfit."""
        self.watch.check()
        if any(self.encoder._modules.get(name) is not module for name, module in self.parts):
            raise Unfit("a module of the encoder was replaced")
        if _global_forward_hooks or _global_forward_pre_hooks:
            raise Unfit("hooks act on all modules")
        made, running = structs.Encoder.from_buffer_copy(self.struct()), []
        for layer in self.encoder.get_submodule(self.family.layers):
            if layer not in self.layers:
                self.layers[layer] = LayerPlan(self.encoder, self.family, layer)
            if self.layers[layer].check():
                running.append(ctypes.pointer(self.layers[layer].struct()))
        made.kept = self._made, running, (ctypes.POINTER(structs.Layer) * len(running))(*running)
        made.layers, made.layer = len(running), ctypes.cast(made.kept[-1], type(made.layer))
        return made
