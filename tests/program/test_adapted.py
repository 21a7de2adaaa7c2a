"""A program with an adapter's matrices added."""

from __future__ import annotations

import numpy as np
import torch

from edgeship.program.adapted import adapted
from edgeship.program.program import TorchProgram


def test_only_the_adapters_layers_change(decoder_model) -> None:
    program = TorchProgram.open(decoder_model("llama"))
    rng = np.random.default_rng(0)
    layer = "model.layers.1.self_attn.v_proj"
    down, up = rng.normal(size=(64, 3)).astype(np.float32), rng.normal(size=(3, 32)).astype(np.float32)
    changed = adapted(program, {layer: (down, up)})
    wanted = program.weight(f"{layer}.weight").numpy() + (down @ up).T
    assert np.allclose(changed.weight(f"{layer}.weight").numpy(), wanted, atol=1e-5)
    assert torch.equal(changed.weight("model.norm.weight"), program.weight("model.norm.weight"))
    tokens = torch.arange(32)[None] + 3
    with torch.no_grad():
        plain, other = (item.module()(tokens)[0] for item in (program, changed))
    assert not torch.allclose(plain, other, atol=1e-2)
