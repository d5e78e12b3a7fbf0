"""Two zeros in every four weights: what is given to torch's kernels, and on a GPU what they answer."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_disparse import (
    UserError,
    apply_masks,
    prunable_parameters,
    speed_up,
    undo_speed_up,
)
from hf_disparse.fast import semi_structured
from tests.helpers.compacting import BATCH
from tests.helpers.speeding import (
    assert_same_bits,
    bits,
)
from tests.helpers.tiny import CONFIGS


def two_of_four(*shape, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    order = torch.rand(shape, generator=generator).view(-1, 4).argsort(1)
    return (weight * (order < 2).view(shape)).to(dtype)


def test_conditions_of_semi_structured_matrices():
    """Every shape and type that `fits` lets through is one that torch's two implementations take."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    for rows in (1, 8, 16, 32, 48, 64):
        for columns in (4, 32, 64, 96, 128):
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                takes = True
                for kind in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
                    least = kind._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
                    takes &= (
                        least is not None and not rows % least.sparse_min_rows and not columns % least.sparse_min_cols
                    )
                assert semi_structured.fits(two_of_four(rows, columns, dtype=dtype)) == takes
    weight = two_of_four(32, 64)
    assert not semi_structured.fits(two_of_four(64, 32).T)  # not contiguous
    assert not semi_structured.fits(torch.ones_like(weight)) and not semi_structured.fits(torch.zeros(0, 64).half())
    assert not semi_structured.fits(torch.zeros(32, 62).half())
    weight[31, 60:63] = 1
    assert not semi_structured.fits(weight)


def test_semi_structured_modules_on_a_cpu(monkeypatch):
    """With torch's conversion replaced, as it needs a GPU: what is converted, what is not, and the way back."""
    config = CONFIGS["bert"]()
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.warns(UserWarning, match="stays as it is: no matrix has two zeros"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        semi_structured.semi_structured(model.half())
    for name, parameter in prunable_parameters(model).items():
        if "layer.0" in name:
            parameter.data = two_of_four(*parameter.shape)
    before, kinds = bits(model), [type(module) for module in model.modules()]
    converted = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: converted.append(weight) or weight)
    assert semi_structured.semi_structured(model) is model and len(converted) == 6
    monkeypatch.setattr(torch.Tensor, "to_dense", lambda weight: weight)
    assert_same_bits(bits(model), before)
    with pytest.raises(UserError, match="the model is sped up"):
        prunable_parameters(model)
    assert model(**BATCH).logits.shape == (2, 2)
    model.train()
    with pytest.raises(UserError, match="cannot be trained"):
        model(**BATCH)
    undo_speed_up(model)
    assert [type(module) for module in model.modules()] == kinds
    assert_same_bits(bits(model), before)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.warns(UserWarning, match="no sparse tensor cores"):
        semi_structured.semi_structured(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_on_a_gpu(dtype, tmp_path):
    config = CONFIGS["bert"]()
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    weights = prunable_parameters(model)
    apply_masks(model, {name: two_of_four(*p.shape) != 0 for name, p in weights.items()})
    model.to("cuda", dtype)
    batch, before = {name: tensor.cuda() for name, tensor in BATCH.items()}, bits(model)
    with torch.no_grad():
        expected = model(**batch).logits
        got = speed_up(model)(**batch).logits
    assert sum(isinstance(m, semi_structured.SemiStructuredLinear) for m in model.modules()) == len(weights)
    assert torch.allclose(got, expected, atol=0.02)
    assert_same_bits(bits(model), before)
    model.save_pretrained(tmp_path)
    assert_same_bits(bits(undo_speed_up(model)), before)
