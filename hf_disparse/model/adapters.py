"""PEFT adapters of single tasks on the shared encoder, which does not change. Needs the extra `peft`.

An adapter is active while its task runs, and off for every other task. A model's folder holds it in `adapter-<task>`, in
PEFT's own format: `PeftModel.from_pretrained(encoder, folder, subfolder="adapter-<task>")` reads it, too.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from hf_disparse.config import UserError, one_line
from hf_disparse.pruning.sped_up import refuse_sped_up

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER_FOLDER = "adapter-"  # and the task; one level only, because transformers' push_to_hub looks no deeper
_WEIGHTS_NAME, _CONFIG_NAME, _PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_NOT_ON_META = ("BOFT", "OFT", "PSOFT", "RANDLORA", "SHIRA")  # they compute while they are created
_STAYS = "because adapters must not change the shared encoder beyond single layers"
_THAT_KEEP_ZEROS = "IA3, HiRA, or SHiRA, whose merge keeps them"


class TaskAdapters:
    """Mixin of `MultitaskModel` for adapters; expects `encoder`, `heads` and `config`."""

    _task_of_encoder: str | None = None  # the task whose adapter is active

    @property
    def adapters(self) -> "dict[str, PeftConfig]":
        """task -> the configuration of its adapter."""
        return getattr(self.encoder, "peft_config", {})

    def add_adapter(self, adapter_config: "PeftConfig", adapter_name: str) -> None:
        """Gives a task its own adapter on the encoder, which is frozen from then on; the heads are not.

        Args:
            adapter_config: of any PEFT method that `peft.inject_adapter_in_model` knows. SHiRA trains weights drawn among
                the non-zero ones, unless it has its own `mask_fn`.
            adapter_name: the task.

        Raises:
            UserError: there is no such task, or the configuration conflicts with the other tasks.
        """
        if getattr(adapter_config, "mask_type", None) == "random":
            adapter_config = copy.copy(adapter_config)
            if adapter_config.mask_fn.__module__.startswith("peft."):
                adapter_config.mask_fn = among_non_zeros
        self._inject(adapter_config, adapter_name)

    def _inject(self, config: "PeftConfig", task: str, on_meta: bool = False) -> None:
        """Checks a configuration and lets PEFT wrap the encoder's layers; `on_meta` allocates no memory if PEFT can."""
        _need_peft()
        from peft import inject_adapter_in_model
        from peft.functional import set_requires_grad
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        self._check_free(task)
        refuse_sped_up(self, "add_adapter")
        taken = {part for name in self.encoder.state_dict() for part in name.split(".")}
        if task in taken or task.startswith(PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "base_layer")):
            raise UserError(
                f"adapter_name: PEFT would confuse task '{task}' with weights of the encoder that have this name; rename the task"
            )
        kinds = {other.peft_type for other in self.adapters.values()}
        if kinds - {config.peft_type}:
            got = getattr(config.peft_type, "value", None)
            raise UserError(f"adapter_config: expected a {kinds.pop().value}, as the other tasks have, got {got}")
        if getattr(config, "modules_to_save", None):
            raise UserError(
                "adapter_config.modules_to_save: must be None; every task's head is trained and saved anyway"
            )
        if getattr(config, "bias", "none") != "none":
            raise UserError("adapter_config.bias: must be 'none', because the other tasks use the encoder's biases too")
        for field in ("layer_replication", "target_parameters", "trainable_token_indices"):
            if getattr(config, field, None):
                raise UserError(f"adapter_config.{field}: must be None, {_STAYS}")
        start = getattr(config, "init_lora_weights", True)
        if not isinstance(start, bool) and start not in ("gaussian", "eva", "orthogonal"):
            raise UserError(
                f"adapter_config.init_lora_weights: expected a bool, gaussian, eva or orthogonal, got {str(start)[:100]}, {_STAYS}"
            )
        with self._whole_or_not(task), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
            try:
                can_meta = on_meta and config.peft_type.value not in _NOT_ON_META
                with torch.device("meta") if can_meta else nullcontext():
                    inject_adapter_in_model(config, self.encoder, task, low_cpu_mem_usage=on_meta)
            except UserError:
                raise
            except Exception as error:  # PEFT raises a dozen kinds
                raise UserError(f"adapter_config: PEFT refuses it for this encoder: {one_line(error)}") from error
        set_requires_grad(self.encoder, list(self.adapters))  # PEFT leaves only the last one trainable
        for _, layer in _tuner_layers(self.encoder):
            layer.train(self.encoder.training)
        self._task_of_encoder = None  # PEFT has changed which adapter is active
        self._use_adapter(task)
        self.config.adapters = list(self.adapters)

    def _check_free(self, task: str) -> None:
        if self.config.unshared:
            own = ", ".join(self.config.unshared)
            raise UserError(
                f"adapter_name: adapters need a model whose tasks share all layers, but {own} have their own"
            )
        if not isinstance(task, str) or task not in self.heads or task in self.adapters:
            free = ", ".join(name for name in self.heads if name not in self.adapters)
            raise UserError(
                f"adapter_name: expected a task without an adapter, one of {free or 'none left'}, got {task!r}"
            )

    @contextmanager
    def _whole_or_not(self, task: str) -> Iterator[None]:
        """Removes a partly added adapter if adding it fails."""
        trainable = [(parameter, parameter.requires_grad) for parameter in self.encoder.parameters()]
        try:
            yield
        except Exception:
            self._drop(task)
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            raise

    def _drop(self, task: str) -> None:
        """Removes an adapter, complete or not, and PEFT's wrappers of layers without any other adapter."""
        self.adapters.pop(task, None)
        if not self.adapters:
            return self._unload()
        self._task_of_encoder = None
        self._use_adapter(next(iter(self.adapters)))
        for name, layer in _tuner_layers(self.encoder):
            with _as_trainable_as_before(layer):
                layer.delete_adapter(task)
            if not any(len(getattr(layer, names)) for names in layer.adapter_layer_names):
                self.encoder.set_submodule(name, layer.get_base_layer())
        self.config.adapters = list(self.adapters)

    def load_adapter(self, peft_model_id: str | Path, adapter_name: str, subfolder: str = "", **hub: Any) -> None:
        """Loads an adapter that PEFT or this class wrote, from a folder or the Hub, for the task `adapter_name`.

        Raises:
            UserError: its files do not fit this encoder, or are not safetensors.
        """
        where = f"{peft_model_id}/{subfolder}".rstrip("/")
        self._check_free(adapter_name)
        _need_peft()
        from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

        try:
            folder = Path(cached_file(str(peft_model_id), _CONFIG_NAME, subfolder=subfolder, **hub)).parent
            weights = cached_file(str(peft_model_id), _WEIGHTS_NAME, subfolder=subfolder, **hub)
            config = PeftConfig.from_pretrained(str(folder))
            tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(weights).items()}
        except Exception as error:  # transformers, PEFT and safetensors raise a dozen kinds
            raise UserError(f"{where}: cannot read {_CONFIG_NAME} and {_WEIGHTS_NAME}: {one_line(error)}") from error
        with self._whole_or_not(adapter_name):
            self._inject(config, adapter_name, on_meta=True)  # no memory before the sizes are checked
            expected = get_peft_model_state_dict(self.encoder, adapter_name=adapter_name)
            problem = _misfit(tensors, expected) or _stray_places(self.encoder, tensors)
            if problem:
                raise UserError(f"{where}: the adapter does not fit this encoder: {problem}")
            set_peft_model_state_dict(self.encoder, tensors, adapter_name, low_cpu_mem_usage=True)

    def delete_adapter(self, adapter_names: str) -> None:
        """Removes a task's adapter; the head stays."""
        if adapter_names not in self.adapters:
            has = ", ".join(self.adapters) or "none"
            raise UserError(f"adapter_names: expected a task with an adapter, {has}, got {adapter_names!r}")
        self._drop(adapter_names)

    def merge_adapter(self) -> None:
        """Merges the adapter of a model's only task into the encoder, which is an ordinary, trainable one afterwards.

        Raises:
            UserError: there are other tasks, or zeros of the encoder would not stay zero; the model is unchanged then.
        """
        if len(self.heads) > 1 or not self.adapters:
            got = f"tasks {', '.join(self.heads)}, adapters {', '.join(self.adapters) or 'none'}"
            raise UserError(
                f"merge_adapter: expected one task and its adapter, got {got}; remove the others with remove_task"
            )
        [task], lost, size = self.adapters, 0, 0
        for _, layer in _tuner_layers(self.encoder):
            trial = copy.deepcopy(layer)  # one at a time
            zero = trial.get_base_layer().weight == 0
            try:
                trial.merge(safe_merge=True, adapter_names=[task])
            except Exception as error:  # PEFT raises a dozen kinds
                raise UserError(f"merge_adapter: PEFT refuses it: {one_line(error)}; keep it unmerged") from error
            lost += int((zero & (trial.get_base_layer().weight != 0)).sum())
            size += int(zero.sum())
        if lost:
            kind = self.adapters[task].peft_type.value
            raise UserError(
                f"merge_adapter: merging {kind} would fill {lost:,} of {size:,} zeros of the encoder; keep it unmerged "
                f"(save_pretrained, push), or train {_THAT_KEEP_ZEROS}"
            )
        for _, layer in _tuner_layers(self.encoder):
            layer.merge(safe_merge=True, adapter_names=[task])
        self._unload()

    def _unload(self) -> None:
        """Removes all of PEFT from the encoder and makes it trainable again."""
        for name, layer in _tuner_layers(self.encoder):
            self.encoder.set_submodule(name, layer.get_base_layer())
        self.encoder.__dict__.pop("peft_config", None)
        self.encoder.requires_grad_(True)
        self._task_of_encoder, self.config.adapters = None, []

    def _use_adapter(self, task: str | None) -> None:
        """Activates the adapter of `task` alone, without freezing the others as PEFT would."""
        if task == self._task_of_encoder:
            return
        for _, layer in _tuner_layers(self.encoder):
            with _as_trainable_as_before(layer):
                if task is None:
                    layer.enable_adapters(False)
                else:
                    layer.set_adapter(task)
                    layer.enable_adapters(True)
        self._task_of_encoder = task

    def save_pretrained(self, save_directory: str | Path, *args: Any, state_dict=None, **kwargs: Any) -> None:
        """As in transformers; adapters go to folders of their own, and the encoder is saved without them."""
        if self.adapters:
            if kwargs.get("is_main_process", True):
                save_adapters(self, save_directory)
            state_dict = without_adapters(self, self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def _get_files_timestamps(self, working_dir: str | Path) -> dict[str, float]:
        """Hides the adapters, which are written early, so that `save_pretrained(push_to_hub=True)` uploads them as new."""
        files = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in files.items() if name.removeprefix(ADAPTER_FOLDER) not in self.adapters}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any):
        """As in transformers, with the adapters in the folder or repository."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        names, above = model.config.adapters, kwargs.get("subfolder") or ""
        if not isinstance(names, list):
            raise UserError(
                f"{pretrained_model_name_or_path}: expected config.json's adapters to be a list of tasks, got {str(names)[:100]}"
            )
        hub = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs}
        for task in names:
            folder = f"{above}/{ADAPTER_FOLDER}{task}".lstrip("/")
            model.load_adapter(pretrained_model_name_or_path, task, subfolder=folder, **hub)
        return model if loaded is model else (model, *loaded[1:])

    def load_checkpoint(self, folder: str | Path) -> None:
        """Loads heads, encoder and adapters, as `save_pretrained` wrote them, into a model with the same adapters."""
        from peft import set_peft_model_state_dict

        layers = {f"{name}." for name, _ in _tuner_layers(self)}
        state = {}
        for name, tensor in load_file(Path(folder, "model.safetensors")).items():
            module, _, last = name.rpartition(".")
            state[f"{module}.base_layer.{last}" if module + "." in layers else name] = tensor
        self.load_state_dict(state, strict=False)
        for task in self.adapters:
            tensors = load_file(Path(folder, f"{ADAPTER_FOLDER}{task}", _WEIGHTS_NAME))
            set_peft_model_state_dict(self.encoder, {n.removeprefix(_PREFIX): t for n, t in tensors.items()}, task)


def save_adapters(model: TaskAdapters, folder: str | Path) -> None:
    """Writes the model's adapters into `adapter-<task>` of `folder`."""
    from peft import get_peft_model_state_dict

    for task, config in model.adapters.items():
        target = Path(folder, f"{ADAPTER_FOLDER}{task}")
        target.mkdir(parents=True, exist_ok=True)
        tensors = get_peft_model_state_dict(model.encoder, adapter_name=task)
        stored = {_PREFIX + name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(stored, target / _WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(target))


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put anything into the model; PEFT need not be installed."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def without_adapters(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of `model` under their names without adapters, which some may have already."""
    if not has_adapters(model):
        return dict(state_dict)
    layers, own, plain = [f"{name}." for name, _ in _tuner_layers(model)], set(model.state_dict()), {}
    for name, tensor in state_dict.items():
        layer = next((layer for layer in layers if name.startswith(layer)), "")
        inner = name.removeprefix(f"{layer}base_layer.")
        if layer and inner != name:
            plain[layer + inner] = tensor
        elif not layer or name not in own:
            plain[name] = tensor
    return plain


def among_non_zeros(base_layer: nn.Linear, r: int, random_seed: int | None = None, **_: Any) -> Tensor:
    """SHiRA's `mask_fn`: draws r (inputs + outputs) of the non-zero weights at random, as a matrix (out, in) of 0 and 1."""
    weight = base_layer.weight
    places = (weight.detach().reshape(-1) != 0).nonzero()[:, 0].cpu()
    number = r * sum(weight.shape)
    if number > len(places):
        most = len(places) // sum(weight.shape)
        raise UserError(
            f"adapter_config.r: SHiRA with r={r} trains {number:,} weights per matrix, but one of {tuple(weight.shape)} "
            f"has {len(places):,} that are not pruned; set r to at most {most}, or choose other target_modules"
        )
    generator = None if random_seed is None else torch.Generator().manual_seed(random_seed)
    chosen = places[torch.randperm(len(places), generator=generator)[:number]]
    mask = torch.zeros(weight.numel(), dtype=weight.dtype)
    mask[chosen] = 1
    return mask.reshape(weight.shape).to(weight.device)


@contextmanager
def _as_trainable_as_before(module: nn.Module) -> Iterator[None]:
    """Restores `requires_grad` afterwards, because PEFT would freeze the adapters of inactive tasks."""
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    yield
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)


def _tuner_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of PEFT's wrappers around linear layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the tensors of a file, or None."""
    for name in sorted(set(tensors) ^ set(expected)):
        return f"{'no' if name in expected else 'an unknown'} tensor {name[:100]}"
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            return f"{name} of {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        floating = tensor.is_floating_point() and expected[name].is_floating_point()
        if not floating and tensor.dtype != expected[name].dtype:
            return f"{name} of {tensor.dtype} instead of {expected[name].dtype}"
    return None


def _stray_places(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Checks the rows and columns that SHiRA stores, because torch does not."""
    for name, tensor in tensors.items():
        if name.endswith(".shira_indices"):
            shape = encoder.get_submodule(name.removesuffix(".shira_indices")).get_base_layer().weight.shape
            limits = torch.tensor(shape)[:, None]
            if tensor.ndim != 2 or len(tensor) != 2 or not ((tensor >= 0) & (tensor < limits)).all():
                return f"{name} outside a matrix of {tuple(shape)}"
    return None


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"adapters: {error}; try: pip install 'hf_disparse[peft]'") from None
