"""From the modules of an encoder to the structs that C runs, checked anew at every call.

The fused path does not call the modules inside an encoder. So each call looks whether they are still what was read: the same
modules, parameters and settings, without hooks. What has changed is read again, or the call goes to transformers' own forward.
"""

import ctypes
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from hf_disparse.config import UserError
from hf_disparse.fast import structs
from hf_disparse.fast.families import Family, activation_of, head_size
from hf_disparse.fast.linear import FastLinear

try:  # private: no public name says whether a model around the encoder records what its modules return
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None  # then modules with recording hooks are left to transformers

_LANES = 64  # as in fast.h
_KNOWN = ("transformers.", "torch.nn.modules.", "hf_disparse.")  # where the classes are defined whose forward is known


class Unfit(Exception):
    """The fused path cannot run these modules as they are; transformers' forward can."""


class Replaced(Unfit):
    """A module was replaced; a new plan may fit the new one."""


class Watch:
    """Notices whether modules that are not called would do something else if they were."""

    def __init__(self, root: nn.Module, but: tuple[nn.Module | None, ...] = ()):
        inside = {id(m) for other in but if other is not None for m in other.modules()}
        self.modules = [m for m in root.modules() if id(m) not in inside]
        if unknown := next((m for m in self.modules if not type(m).__module__.startswith(_KNOWN)), None):
            raise Unfit(f"{type(unknown).__name__} is the user's")
        self.children = [(m._modules, tuple(m._modules.values())) for m in self.modules if m._modules]
        self.modal = [m.__dict__ for m in self.modules if not isinstance(m, (nn.Embedding, nn.LayerNorm, nn.Identity))]

    def check(self) -> None:
        """Raises Unfit if a module was replaced, hooked, given another forward or set to training."""
        for children, before in self.children:
            if tuple(children.values()) != before:
                raise Replaced("a module was replaced")
        if any(here["training"] for here in self.modal):
            raise Unfit("a module is in training mode")
        for module in self.modules:
            here = module.__dict__
            if here["_forward_pre_hooks"] or here["_forward_hooks"] or "forward" in here:
                hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
                if "forward" in here or not all(_is_known(hook) for hook in hooks):
                    raise Unfit(f"{type(module).__name__} has hooks or another forward")


def _is_known(hook: Any) -> bool:
    """Whether the fused path does what this hook does, or transformers has left it behind and it records nothing now."""
    if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
        return _active_collector is not None and not _active_collector.get()
    return hasattr(hook, "fast_path")


class _Source:
    """Reads the parameters and settings of some modules, and tells when they are others than before."""

    def __init__(self) -> None:
        self.slots: list[tuple[dict, str]] = []
        self.copied: list[tuple[dict, str]] = []  # parameters of which C reads something computed from them
        self.settings: list[tuple[dict, str]] = []
        self.buffers: list[tuple[dict, str]] = []
        self.linears: list[FastLinear] = []
        self.modules: set[nn.Module] = set()  # that C stands in for

    def norm(self, module: nn.Module, features: int) -> structs.Norm:
        """What C reads of a LayerNorm or Identity."""
        self.modules.add(module)
        if isinstance(module, nn.Identity):
            return structs.Norm(None, None, 0)
        shape = self.setting(module, "normalized_shape")
        if not isinstance(module, nn.LayerNorm) or shape != (features,) or module.weight is None:
            raise Unfit(f"{type(module).__name__} is not a LayerNorm with weights")
        weight, bias = self._tensor(module, "weight", features), self._tensor(module, "bias", features)
        return structs.Norm(weight, bias, self.setting(module, "eps"))

    def matrix(self, module: nn.Module, rows: int, columns: int) -> structs.Matrix:
        """What C reads of a FastLinear."""
        if not isinstance(module, FastLinear) or (module.matrix.rows, module.matrix.columns) != (rows, columns):
            raise Unfit(f"{type(module).__name__} is not a Linear of {rows} x {columns}")
        self.modules.add(module)
        self.linears.append(module)
        struct = module.matrix.struct()
        struct.bias = self._tensor(module, "bias", rows)
        return struct

    def table(self, module: nn.Module, size: int) -> int:
        """Where an embedding's rows are."""
        if type(module) is not nn.Embedding or self.setting(module, "max_norm") is not None:
            raise Unfit(f"{type(module).__name__} is not a plain Embedding")
        self.modules.add(module)
        return self._tensor(module, "weight", len(module.weight), size)

    def setting(self, owner: Any, name: str) -> Any:
        """An attribute of a module or configuration, None if it has no such."""
        self.settings.append((owner.__dict__, name))
        return owner.__dict__.get(name)

    def buffer(self, module: nn.Module, name: str) -> Tensor | None:
        """A buffer, which may change in place."""
        self.buffers.append((module._buffers, name))
        return module._buffers.get(name)

    def refuse_others(self, watch: Watch) -> None:
        """Raises Unfit if a module has a forward that C does not stand in for."""
        for module in watch.modules:
            if module not in self.modules and not module._modules and not isinstance(module, (nn.Dropout, nn.Identity)):
                raise Unfit(f"{type(module).__name__} is in an unknown place")

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
        """Changes if a parameter, matrix or setting is exchanged; new values in the same place need no new structs."""
        tensors = (slot.get(name) for slot, name in self.slots)  # a parametrization takes a parameter away
        copied = [slot[name].detach().cpu().float().numpy().tobytes() for slot, name in self.copied]
        pointers = [t if t is None else (t.data_ptr(), t.dtype) for t in tensors]
        settings = [owner.get(name) for owner, name in self.settings]
        buffers = [_version(slot.get(name)) for slot, name in self.buffers]
        return [*pointers, *copied, *settings, *buffers, *(linear.matrix for linear in self.linears)]


def _version(tensor: Tensor | None) -> tuple | None:
    """Changes with a buffer's place and, as far as torch counts, with its numbers."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


class _Plan:
    """A struct made from modules by `read`, made again when the parameters are others; threads may share it."""

    watch: Watch
    _made: tuple[_Source, list, Any] | None = None

    def struct(self) -> Any:
        """The struct. Raises Unfit."""
        made = self._made
        try:
            changed = made is None or made[0].state() != made[1]
        except RuntimeError as error:
            raise UserError(structs.NO_DATA) from error
        if changed:
            source = _Source()
            try:
                struct = self.read(source)
                source.refuse_others(self.watch)
            except AttributeError as error:  # a module of another kind
                raise Unfit(str(error)) from None
            made = self._made = (source, source.state(), struct)
        return made[2]

    def read(self, source: _Source) -> Any:
        """Makes the struct, which keeps alive what it points to beyond the parameters."""
        raise NotImplementedError


def _activation(family: Family, layer: nn.Module) -> Any:
    """The activation of a layer, a module or function; None if the layer is of another kind."""
    try:
        return attrgetter(family.activation)(layer)
    except AttributeError:
        return None


class LayerPlan(_Plan):
    """One layer of the encoder."""

    def __init__(self, plan: "EncoderPlan", layer: nn.Module):
        self.plan, self.layer, self.watch = plan, layer, Watch(layer)

    def check(self) -> bool:
        """Whether the layer is run; False if it passes its input on. Raises Unfit."""
        self.watch.check()
        return not any(getattr(hook, "fast_path", None) == "skip" for hook in self.layer._forward_hooks.values())

    def read(self, source: _Source) -> structs.Layer:
        """Reads the layer's matrices and norms, and what its attention adds."""
        get, plan, family = self.layer.get_submodule, self.plan, self.plan.family
        activation = _activation(family, self.layer)
        if activation_of(activation) != plan.activation:
            raise Unfit("another activation than the first layer's")
        source.modules.add(activation)
        features, inner, context = plan.features, get(family.down).in_features, get(family.merge).in_features
        if context % plan.head_size:
            raise Unfit("heads of another size")
        made = structs.Layer(heads=context // plan.head_size, projections=len(family.project), window=-1)
        rows = 3 * context // len(family.project)
        made.project = (structs.Matrix * 3)(*(source.matrix(get(name), rows, features) for name in family.project))
        made.merge = source.matrix(get(family.merge), features, context)
        made.up = source.matrix(get(family.up), inner * (2 if family.norm_first else 1), features)
        made.down = source.matrix(get(family.down), features, inner)
        made.before, made.after = (source.norm(get(name), features) for name in (family.before, family.after))
        made.kept = self._attention(made, source)
        return made

    def _attention(self, made: structs.Layer, source: _Source) -> list[Tensor]:
        """Rotary positions, local attention and relative positions; returns the tensors that C will read."""
        plan, encoder = self.plan, self.plan.encoder
        attention = self.layer.get_submodule(plan.family.project[0].rpartition(".")[0])
        usual = {"scaling": plan.head_size**-0.5, "is_causal": False}
        usual |= {"attention_head_size": plan.head_size, "head_dim": plan.head_size}
        for name, value in usual.items():
            if source.setting(attention, name) not in (None, value):
                raise Unfit(f"attention with another {name}")
        tensors = []
        if hasattr(encoder, "rotary_emb"):
            kind = source.setting(self.layer, "attention_type")
            for name in encoder.rotary_emb._buffers:
                source.buffer(encoder.rotary_emb, name)
            places = torch.arange(plan.positions, device="cpu").unsqueeze(0)
            tensors = list(encoder.rotary_emb(torch.zeros(1, dtype=torch.float32, device="cpu"), places, kind))
            half = plan.head_size // 2
            tensors = [t[0, :, :half].float().contiguous() for t in tensors]
            made.cosines, made.sines = (structs.address(t) for t in tensors)
            if kind == "sliding_attention":
                made.window = plan.window
        stack = getattr(encoder, "encoder", None)
        if hasattr(stack, "relative_attention_bias"):
            source.copied.append((stack.relative_attention_bias._parameters, "weight"))
            bias = distance_bias(stack, plan.reach)
            for hook in attention._forward_pre_hooks.values():
                bias = bias[hook.places].contiguous()  # the heads that a compact layer still has
            made.distance_bias = structs.address(bias)
            tensors = [bias]
        return tensors


def distance_bias(stack: nn.Module, reach: int) -> Tensor:
    """MPNet's relative positions by distance, (heads, 2 * reach + 1), query's place - key's place from -reach on."""
    distances = torch.arange(-reach, reach + 1, device="cpu")
    buckets = stack.relative_position_bucket(-distances)  # 32 of them, whatever the configuration says
    return stack.relative_attention_bias.weight.detach()[buckets].T.contiguous()


class EncoderPlan(_Plan):
    """The encoder around its layers."""

    def __init__(self, encoder: nn.Module, family: Family):
        self.encoder, self.family, self.config = encoder, family, encoder.config
        stack, config = encoder.get_submodule(family.layers), encoder.config
        # What all layers have in common. A later change of the configuration does not reach modules that exist.
        self.features, self.head_size = config.hidden_size, head_size(config)
        self.positions = config.max_position_embeddings
        self.reach = self.positions + _LANES  # how far from 0 the distances of a `distance_bias` go
        self.window = getattr(config, "sliding_window", None)
        self.activation = activation_of(_activation(family, stack[0])) if len(stack) else 0
        if self.activation is None:
            raise Unfit("the activation is unknown")
        self.layers: dict[nn.Module, LayerPlan] = {}
        outside = (stack, getattr(encoder, "private", None), getattr(encoder, "pooler", None))
        self.watch = Watch(encoder, outside)
        # The encoder itself is called; its pooler and private layers are looked up at every call.
        self.watch.modules.remove(encoder)
        self.watch.children = [(c, before) for c, before in self.watch.children if c is not encoder._modules]
        self.parts = [(n, m) for n, m in encoder._modules.items() if n not in ("pooler", "private")]

    def read(self, source: _Source) -> structs.Encoder:
        """Reads embeddings and norms."""
        encoder, family = self.encoder, self.family
        names = [name for name in family.tables if hasattr(encoder.embeddings, name)]
        modules = [encoder.embeddings.get_submodule(name) for name in names]
        self.tables = [(name, len(module.weight)) for name, module in zip(names, modules, strict=True)]
        made = structs.Encoder(
            features=self.features,
            head_size=self.head_size,
            embedding_size=modules[0].embedding_dim,
            activation=self.activation,
            norm_first=family.norm_first,
            gated=family.norm_first,
            tables=len(modules),
            scale=self.head_size**-0.5,
            reach=self.reach,
        )
        for i, module in enumerate(modules):
            made.table[i] = source.table(module, made.embedding_size)
        made.embedding_norm = source.norm(encoder.get_submodule(family.embedding_norm), made.embedding_size)
        if family.norm_first:
            made.last_norm = source.norm(encoder.final_norm, made.features)
        if hasattr(encoder, "embeddings_project"):
            made.projection = ctypes.pointer(
                source.matrix(encoder.embeddings_project, made.features, made.embedding_size)
            )
        elif made.embedding_size != made.features:
            raise Unfit("embeddings of another size")
        stack = getattr(encoder, "encoder", None)  # layers read what these two hold
        source.modules |= {getattr(encoder, "rotary_emb", None), getattr(stack, "relative_attention_bias", None)}
        self._check_settings(source)
        return made

    def _check_settings(self, source: _Source) -> None:
        """Raises Unfit unless the encoder counts positions from 0, takes types as 0 and attends to all tokens."""
        embeddings = self.encoder.embeddings
        positions, types = (source.buffer(embeddings, name) for name in ("position_ids", "token_type_ids"))
        if positions is not None and not torch.equal(
            positions.flatten(), torch.arange(positions.numel(), device="cpu")
        ):
            raise Unfit("other positions")
        if types is not None and types.any():
            raise Unfit("other token types")
        if any(source.setting(self.config, name) for name in ("is_decoder", "add_cross_attention")):
            raise Unfit("a decoder")

    def ready(self) -> structs.Encoder:
        """The encoder with the layers that it has now. Raises Unfit."""
        self.watch.check()
        if any(self.encoder._modules.get(name) is not module for name, module in self.parts):
            raise Replaced("a module of the encoder was replaced")
        if self.encoder.config is not self.config or getattr(self.config, "sliding_window", None) != self.window:
            raise Replaced("another configuration")
        if _global_forward_hooks or _global_forward_pre_hooks:
            raise Unfit("hooks act on all modules")
        made, running = structs.Encoder.from_buffer_copy(self.struct()), []
        stack = self.encoder.get_submodule(self.family.layers)
        known = self.layers
        plans = self.layers = {layer: known.get(layer) or LayerPlan(self, layer) for layer in stack}  # forgets old ones
        for layer in stack:
            if plans[layer].check():
                running.append(ctypes.pointer(plans[layer].struct()))
        made.kept = self._made, running, (ctypes.POINTER(structs.Layer) * len(running))(*running)
        made.layers, made.layer = len(running), ctypes.cast(made.kept[-1], type(made.layer))
        return made
