"""Places for adapters in a model that was made without them."""

from __future__ import annotations

import torch

from edgeship.lowering.onnx.adapters import Matrices, linear_layers, open_layers


def test_layers_share_their_weights_and_answer_with_what_an_adapter_adds() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    plain, layers, state = model(x), linear_layers(model), dict(model.state_dict())
    open_layers(model, ["0", "2"])
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == {
        name: value.data_ptr() for name, value in state.items()
    }
    assert all(type(layer) is torch.nn.Linear for layer in layers.values())
    assert not any(module.training for module in model.modules())
    nothing = [torch.zeros(3, 0), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(0, 2)]
    with Matrices(["0", "2"], nothing):
        assert torch.equal(model(x), plain)
    down, up = torch.randn(4, 1), torch.randn(1, 2)
    with Matrices(["0", "2"], [*nothing[:2], down, up]):
        inner = torch.relu(x @ state["0.weight"].T)
        assert torch.allclose(model(x), plain + inner @ down @ up, atol=1e-6)
