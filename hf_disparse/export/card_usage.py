"""The code that a model card shows: how to load and use the model."""

from hf_disparse.config import TaskConfig
from hf_disparse.export.card_metadata import pipeline_tag
from hf_disparse.model.multitask import MultitaskModel


def usage(name: str, model: MultitaskModel) -> str:
    """The section on how to use a `MultitaskModel`."""
    pair = all(len(task.columns) == 2 for task in model.tasks.values())
    example = '("A first text.", "A second text.")' if pair else '"A text."'
    return (
        "## Use\n\n```bash\npip install hf_disparse\n```\n\n```python\nfrom hf_disparse import MultitaskPipeline\n\n"
        f'pipeline = MultitaskPipeline.from_pretrained("{name}")\n'
        f"print(pipeline({example}))  # the answers of all tasks that take {'two texts' if pair else 'one text'}\n```\n\n"
        "After `import hf_disparse`, `AutoModel.from_pretrained` loads it too, for further training or calls with `task=`."
    )


def usage_alone(task: TaskConfig, class_name: str, name: str, subfolder: str | None) -> str:
    """The section on how to use one task as a plain model; `pipeline` takes no subfolder, so there it is loaded first."""
    text = "{'text': 'A first text.', 'text_pair': 'A second text.'}" if len(task.columns) == 2 else "'A text.'"
    if subfolder is None:
        code = f'from transformers import pipeline\n\nprint(pipeline("{pipeline_tag(task)}", "{name}")({text}))'
    else:
        code = (
            f"from transformers import AutoTokenizer, {class_name}, pipeline\n\n"
            f'where = {{"pretrained_model_name_or_path": "{name}", "subfolder": "{subfolder}"}}\n'
            f"model, tokenizer = {class_name}.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)\n"
            f'print(pipeline("{pipeline_tag(task)}", model, tokenizer=tokenizer)({text}))'
        )
    return f"## Use\n\n```python\n{code}\n```"
