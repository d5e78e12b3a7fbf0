"""How transformers reads an exported checkpoint once `import hf_disparse` has registered this.

transformers calls it a "quantizer": its only hook for weights that are stored in another form than they are used in.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer

from hf_disparse.config import UserError
from hf_disparse.export.folder import digests
from hf_disparse.export.packed import BITMASK, fill, zeros
from hf_disparse.fast.packed import packed_weights, take_packed
from hf_disparse.files import open_safetensors, read_json
from hf_disparse.model.loading import CONFIG_NAME, WEIGHTS_NAME
from hf_disparse.model.structure import METHOD, StoredForm, rebuild
from hf_disparse.model.unshared import UnsharedLayers

_SOURCES = ["weight$", f"weight{BITMASK}$"]


@register_quantizer(METHOD)
class StoredFormReader(HfQuantizer):
    """Rebuilds the encoder's shape, checks the files and unpacks matrices while transformers loads them."""

    is_trainable = is_qat_trainable = True

    def __init__(self, quantization_config: StoredForm, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        # Threads compute digests and fill the matrices read so far while transformers reads the rest.
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._jobs: list[Future] = []

    def is_serializable(self, *_, **__) -> bool:
        """True: a loaded model is an ordinary one."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **_) -> None:
        """Rebuilds the shape that `structure` describes, and starts to check the files."""
        if not checkpoint_files or [Path(file).name for file in checkpoint_files] != [WEIGHTS_NAME]:
            got = ", ".join(Path(file).name for file in checkpoint_files or ()) or "none"
            raise UserError(f"{CONFIG_NAME}: expected the weights in {WEIGHTS_NAME} in the same folder, got {got}")
        self._folder = Path(checkpoint_files[0]).parent
        if self.quantization_config.structure:
            with torch.device("cpu"):  # not transformers' meta device, where index tensors have no values
                rebuild(model.base_model, self.quantization_config.structure)
                if isinstance(model, UnsharedLayers):
                    model.make_private()
            check_factors(self._folder / WEIGHTS_NAME, self.quantization_config.structure)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        check_header(self._folder / WEIGHTS_NAME)
        form = self.quantization_config
        self._digests = None
        if form.packed or form.sha256:  # a compact model saved by a Trainer has no digests
            self._digests = self._threads.submit(lambda: digests(self._folder, read_json(self._folder / CONFIG_NAME)))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_) -> None:
        """Waits for the threads, raises what they found, and leaves an ordinary model."""
        form = self.quantization_config
        if self._digests:
            check_digests(self._folder, self._digests.result(), form.sha256)
        for job in self._jobs:
            job.result()  # raises the job's error
        self._threads.shutdown()
        if form.structure:  # describes the model; the rest of the form described the file
            model.config.quantization_config = StoredForm(structure=form.structure)
        # Otherwise transformers would reverse the conversion, and so pack the model, whenever it is saved.
        model._weight_conversions = [c for c in model._weight_conversions if c.source_patterns != _SOURCES]
        # transformers 5.10 does not check shapes if there is a quantizer.
        for name, tensor in model.state_dict().items():
            if tensor.shape != self._shapes[name]:
                raise UserError(
                    f"{name}: expected shape {tuple(self._shapes[name])} according to {CONFIG_NAME}, "
                    f"got {tuple(tensor.shape)}"
                )
        self._keep_packed(model)

    def _keep_packed(self, model: PreTrainedModel) -> None:
        """Hands the weights that were not unpacked to the modules that multiply by them."""
        weights, encoder = packed_weights.get(), model.base_model
        if weights:
            prefix = "" if encoder is model else f"{model.base_model_prefix}."
            take_packed(encoder, weights, prefix)
            weights.clear()

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The conversion that transformers applies to every weight it reads."""
        return [WeightConverter(list(_SOURCES), "weight", [Unpack(self._threads, self._jobs)])]

    def update_weight_conversions(self, weight_conversions: list, *_) -> list:
        """The model's own conversions, then ours."""
        return weight_conversions + self.get_weight_conversions()


class Unpack(ConversionOps):
    """Turns values and bitmask into a matrix that a thread fills; a weight without a bitmask passes through.

    transformers wraps an error of a conversion in a report with tracebacks, so errors are left to the jobs' results.
    """

    def __init__(self, threads: Executor, jobs: list[Future]):
        self.threads, self.jobs = threads, jobs

    def __deepcopy__(self, _) -> "Unpack":
        return self  # transformers copies the conversion for each weight; all copies share one list of jobs

    def convert(self, input_dict: dict, *_, full_layer_name: str, model: PreTrainedModel, **__) -> dict:
        """input_dict: {source pattern: [tensor]}. Returns {full name: tensor}."""
        tensors = {pattern: value[0] if isinstance(value, list) else value for pattern, value in input_dict.items()}
        parameter = model.get_parameter_or_buffer(full_layer_name)
        weight = tensors[_SOURCES[0]].to(parameter.dtype)
        if _SOURCES[1] not in tensors:
            return {full_layer_name: weight}
        values, bitmask = weight.cpu(), tensors[_SOURCES[1]].cpu()
        kept = packed_weights.get()
        if kept is not None and _multiplies_sparse(model, full_layer_name, values):
            kept[full_layer_name] = (values, bitmask)
            return {full_layer_name: torch.empty_like(parameter)}  # on the meta device: takes no memory
        try:
            matrix = zeros(values, bitmask, tuple(parameter.shape))
        except UserError as error:
            self._submit(full_layer_name, _refuse, error)
            return {full_layer_name: torch.empty_like(parameter)}  # on the meta device: takes no memory
        self._submit(full_layer_name, fill, matrix, values, bitmask)
        if weight.device.type != "cpu":
            self.jobs[-1].exception()  # waits until it is filled, on the CPU
        return {full_layer_name: matrix.to(weight.device)}

    def _submit(self, name: str, work: Callable, *arguments: Any) -> None:
        """Has a thread run `work`; its error will name the weight."""

        def job() -> None:
            try:
                work(*arguments)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None

        self.jobs.append(self.threads.submit(job))

    @property
    def reverse_op(self) -> ConversionOps:
        """Never used: the conversion is removed once the model is loaded."""
        raise NotImplementedError


def _multiplies_sparse(model: PreTrainedModel, name: str, values: torch.Tensor) -> bool:
    """Whether `speed_up` will store this weight without zeros: a Linear module's of the encoder, three quarters zeros."""
    module = model.get_submodule(name.rpartition(".")[0])
    inside = any(module is m for n, m in model.base_model.named_modules() if "pooler" not in n.split("."))
    return type(module) is nn.Linear and inside and values.numel() < 0.25 * module.weight.numel()


def _refuse(error: UserError) -> None:
    raise error


def check_header(path: Path) -> None:
    """Checks that the file is complete and has values for every bitmask.

    Raises:
        UserError: names the file or the tensor.
    """
    with open_safetensors(path) as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    for name in shapes:
        if name.endswith(f"weight{BITMASK}") and len(shapes.get(name.removesuffix(BITMASK), ())) != 1:
            raise UserError(f"{name.removesuffix(BITMASK)}: its bitmask is there, but its values are not")


def check_factors(path: Path, structure: dict) -> None:
    """Checks that the file has both factors of every factorised matrix: transformers would initialise missing ones.

    Raises:
        UserError: names the module.
    """
    with open_safetensors(path) as stored:
        names = list(stored.keys())
    for module in structure.get("ranks", {}):
        for factor in ("down", "up"):
            if not any(f".{name}".endswith(f".{module}.{factor}.weight") for name in names):
                raise UserError(
                    f"{CONFIG_NAME}: quantization_config.structure: '{module}' has a rank, but {path.name} has no "
                    f"{module}.{factor}.weight"
                )


def check_digests(folder: Path, found: dict[str, str], expected: dict | None) -> None:
    """Checks that both files are, bit for bit, those that were exported.

    Raises:
        UserError: names the file.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not isinstance(expected, dict) or expected.get(name) != found[name]:
            raise UserError(
                f"{folder / name}: not the exported file: its sha256 differs from the one in {CONFIG_NAME}.\n"
                "Download it again; if you changed it on purpose, export the model again."
            )
