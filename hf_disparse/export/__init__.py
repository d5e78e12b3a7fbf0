"""What leaves the project: checkpoints that are small or fast, and how transformers reads them."""

from hf_disparse.export import loading  # noqa: F401, registers the stored form with transformers
from hf_disparse.export.card import write_card
from hf_disparse.export.compact import compact, save_compact
from hf_disparse.export.folder import is_multitask
from hf_disparse.export.hub import push
from hf_disparse.export.packed import save_packed
from hf_disparse.export.task import save_tasks, task_model
from hf_disparse.export.to_onnx import save_onnx
from hf_disparse.files import new_folder
from hf_disparse.model.factorise import factorise, multiply_out

__all__ = [
    "compact",
    "factorise",
    "is_multitask",
    "multiply_out",
    "new_folder",
    "push",
    "save_compact",
    "save_onnx",
    "save_packed",
    "save_tasks",
    "task_model",
    "write_card",
]
