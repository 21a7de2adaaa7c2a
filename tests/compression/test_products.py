import pytest
import torch

from edgeship.compression import products
from edgeship.compression.products import linear, product


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (128, 576, 192), (0, 4, 3), (3, 300, 1)])
def test_products_are_those_of_doubles(shape, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(products, "_onednn", lambda: None)
    rows, columns, others = shape
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, columns, generator=generator), torch.randn(others, columns, generator=generator)
    wanted = left.double() @ right.double().T
    assert product(left, right).shape == (rows, others)
    torch.testing.assert_close(product(left, right).double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "strided", "double", "half", "line"])
def test_linear_layers_answer_as_torch_has_them(kind, bias):
    generator = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(2, 6, 8, generator=generator), torch.randn(5, 8, generator=generator)
    inputs = {"strided": inputs.transpose(0, 1), "double": inputs.double(), "line": inputs[0, 0]}.get(kind, inputs)
    weight = weight.double() if kind == "double" else weight
    if kind == "half":
        inputs, weight = inputs.bfloat16(), weight.bfloat16()
    more = torch.randn(5, generator=generator).to(weight.dtype) if bias else None
    torch.testing.assert_close(linear(inputs, weight, more), torch.nn.functional.linear(inputs, weight, more))
