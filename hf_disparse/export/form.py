"""What `quantization_config` in the config.json of an exported checkpoint says. Layer 7.

"Quantization" is transformers' word for weights that are stored in another form than they are used in; there is no other
place where it looks before it loads.
"""

from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_disparse.config import UserError

METHOD, FORM_VERSION = "hf_disparse", 1


@register_quantization_config(METHOD)
class StoredForm(QuantizationConfigMixin):
    """The form of a checkpoint.

    Args:
        packed: matrices are stored as their non-zeros and a bitmask.
        structure: heads and neurons by layer, of a compact encoder, and ranks of matrices in two factors; see
            `hf_disparse.model.structure`.
        sha256: file -> digest, of the checkpoint's weights and configuration, as exported.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = FORM_VERSION,
        packed: bool = False,
        structure: dict | None = None,
        sha256: dict | None = None,
        **newer: Any,
    ):
        if version != FORM_VERSION or newer:
            raise UserError(
                f"config.json: expected format version {FORM_VERSION} of hf_disparse, got {str(version)[:40]} with "
                f"{', '.join(newer)[:100] or 'no further fields'}; a newer hf_disparse reads it"
            )
        self.quant_method = METHOD
        self.version, self.packed, self.structure, self.sha256 = version, packed, structure, sha256
        self.dequantize = True  # what is loaded is an ordinary model

    def to_dict(self) -> dict[str, Any]:
        """What is not at its default."""
        return {key: value for key, value in super().to_dict().items() if value and key != "dequantize"}


def structure_of(model: Any) -> dict[str, Any]:
    """What of a model's shape the configuration of its architecture does not say."""
    form = getattr(model.config, "quantization_config", None)
    return dict(form.structure) if isinstance(form, StoredForm) and form.structure else {}


def set_structure(model: Any, structure: dict[str, Any]) -> None:
    """Makes the configuration of a model say that; empty entries are left out."""
    structure = {key: entries for key, entries in structure.items() if entries}
    if structure:
        model.config.quantization_config = StoredForm(structure=structure)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
