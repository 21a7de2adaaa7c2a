"""Modules of experts, apart, beside what they were."""

from __future__ import annotations

import torch

from edgeship.llm.modules import experts_of, holds_experts


def test_experts_that_compute_nothing_give_what_they_are_given():
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    config = LongcatFlashConfig(
        hidden_size=8, expert_ffn_hidden_size=12, n_routed_experts=3, zero_expert_num=2, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    fused = LongcatFlashExperts(config)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter)
    assert holds_experts(fused)
    apart = experts_of(fused)
    assert apart is not None
    assert (len(apart.down), apart.idle) == (3, 2)
    hidden, weights = torch.randn(6, 8), torch.rand(6, 2)
    index = torch.tensor([[0, 3], [4, 1], [3, 4], [2, 0], [1, 2], [4, 0]])
    torch.testing.assert_close(apart(hidden, index, weights), fused(hidden, index, weights))
