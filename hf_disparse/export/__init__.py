"""What leaves the project: checkpoints that are small, and how transformers reads them."""

from hf_disparse.export import loading  # noqa: F401, registers the stored form with transformers
from hf_disparse.export.packed import save_packed

__all__ = ["save_packed"]
