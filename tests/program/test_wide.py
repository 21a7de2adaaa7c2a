"""What a float16 program computes in float32: what squares, and tiny constants, on the way into what narrows."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgeship.core.model import TensorSpec
from edgeship.passes.lower.torch_to_coreai import TorchToCoreAI
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML
from edgeship.program.export import make_program
from edgeship.program.wide import kind_of, wide_nodes
from edgeship.runtimes.coreai.runtime import RUNTIME as COREAI
from edgeship.runtimes.coreml.runtime import RUNTIME as COREML

BASIS = torch.rand(16, 6, generator=torch.Generator().manual_seed(0)) / 8
CASES = {
    "floor": lambda x: torch.log(x.pow(2).sum(-1).clamp(min=1e-10)),
    "added": lambda x: torch.log10(x.abs() + 1e-10),
    "mel": lambda x: torch.log10(torch.clamp((x * x) @ BASIS, min=1e-10)),
    "by_hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8),
    "unit": lambda x: functional.normalize(x, dim=1),
    "length": lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-6),
    "spread": lambda x: x.std(-1),
    "alike": lambda x: functional.cosine_similarity(x, x.flip(-1) + 0.1 * x, dim=1),
    "responses": lambda x: x * (x.norm(dim=-1, keepdim=True) / (x.norm(dim=-1, keepdim=True).mean(1, keepdim=True) + 1e-6)),
    "root": lambda x: torch.sqrt(x * x + x.flip(1) ** 2 + 1e-12),
    "rms": lambda x: functional.rms_norm(x, (16,), eps=1e-5),
    "groups": lambda x: functional.group_norm(x, 2),
    "rows": lambda x: functional.layer_norm(x, (16,)),
    "batch": lambda x: functional.batch_norm(x, None, None, training=True),
    "likely": lambda x: functional.log_softmax(x, -1),
    "inverse": lambda x: 1 / (x.abs() + 2e-4),
}  # fmt: skip


class All(torch.nn.Module):
    def forward(self, x):
        return tuple(case(x) for case in CASES.values())


@pytest.fixture(scope="module")
def program():
    return make_program(All(), [TensorSpec("x", "f32", (1, 4, 16))], [torch.randn(1, 4, 16)], output_names=list(CASES))


@pytest.mark.parametrize(("runtime", "step"), [(COREML, TorchToCoreML("iOS17")), (COREAI, TorchToCoreAI())])
def test_right_at_every_size(runtime, step, program, lower):
    noise = np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32)
    spiky = np.where(np.arange(64).reshape(1, 4, 16) % 13 == 5, 100, 0.02 * noise).astype(np.float32)
    feeds = {"noise": noise, "zeros": 0 * noise, "1e-3": 1e-3 * noise, "3000": 3000 * noise, "spiky": spiky}
    bad = {}
    with runtime.open(lower(program, step)) as session:
        for feed, x in feeds.items():
            found = session.run({"x": x})
            with torch.no_grad():
                wanted = All()(torch.from_numpy(x))
            for name, want in zip(CASES, wanted, strict=True):
                have, want = found[name].astype(np.float64), want.double().numpy()
                noise_power, power = ((have - want) ** 2).sum(), (want**2).sum()
                if not np.isfinite(have).all() or noise_power > 1e-3 * power:
                    bad[name, feed] = (float(power), float(noise_power))
    assert bad == {}


def test_layers_and_plain_arithmetic_stay_narrow():
    def plain(x):
        y = torch.softmax(x @ x.transpose(1, 2) / 4.0, -1) @ x
        return functional.gelu(y) * 0.5 + y / 3 + torch.sigmoid(y) ** 2

    module = torch.nn.Module()
    module.forward = plain
    made = make_program(module, [TensorSpec("x", "f32", (1, 4, 16))], [torch.randn(1, 4, 16)])
    assert [kind_of(node) for node in wide_nodes(made.exported.graph)] == []
