"""A head that is a DTensor: refused as it is; what the words say to pass gives the whole head's numbers."""

from __future__ import annotations

import rank_calls
import torch
from rank_pool import RankPool

import fastreward as fr


def test_a_sharded_head(ranks: RankPool) -> None:
    hidden, weight, labels = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 10, 4])
    leaf = weight.clone().requires_grad_()
    expected = fr.linear_token_logprobs(hidden, leaf, labels).logprobs
    expected.square().sum().backward()
    request = {"hidden": hidden, "weight": weight, "labels": labels}
    for found in ranks.run(rank_calls.sharded_head, [request] * 2):
        assert "weight.full_tensor()" in found["refused"]
        assert "process_group=mesh.get_group()" in found["refused"]
        assert torch.equal(found["whole"], expected.detach())
        torch.testing.assert_close(found["local"], expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["grad"], leaf.grad, rtol=1e-5, atol=1e-5)
