"""What ranks tell each other of a token whose vocabulary is split over them: a few floats, never a logit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fastreward._runtime.layout import FLAG, STATE
from fastreward._runtime.logprobs import merge
from fastreward.distributed.ranks import Ranks

#: What always crosses, and what does for an output that is asked for. All are exact as float32, or sums whose relative
#: error that is (argmax and rank count columns of one slice, fewer than 2^24).
_ALWAYS: Final = ("max", "sum_exp", "label_logit")
_FOR: Final = {
    "entropy": "sum_t_exp",
    "log_sum_sq_probs": "sum_sq_exp",
    "mean_logit": "sum_logit",
    "argmax": "argmax",
    "rank": "rank",
}


class Slices:
    """Where each rank's slice of the vocabulary lies. The host need not know it: i64 on the device."""

    def __init__(self, ranks: Ranks, width: int, labels: Tensor, same: Mapping[str, object]) -> None:
        """The first collective of a call; labels [N] are global, and they and `same` are the same on every rank."""
        widths = ranks.meet(width, same={**same, "labels": labels})[:, 0]
        self.ranks, self.width = ranks, width
        self.starts, self.start, self.vocab = widths.cumsum(0) - widths, ranks.before(widths), widths.sum()

    def local(self, ids: Tensor) -> Tensor:
        """Global ids as columns of this rank's slice; outside [0, width) where another has them."""
        return ids - self.start

    def inside(self, local: Tensor) -> Tensor:
        """Whether this rank has the column."""
        return (local >= 0) & (local < self.width)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of what the ranks have; of a logit, which all but one take for -inf, the one there is."""
        return self.ranks.gather(x).amax(0)

    def whole(self, state: Tensor, inverse: float | Tensor, flags: int, columns: Tensor | None) -> Tensor:
        """The state f64 [N, 8] of the whole vocabulary from that of this slice, sum_logit as a mean.

        columns: of each row of this slice, where not all count.
        """
        names = [*_ALWAYS, *(name for output, name in _FOR.items() if flags & FLAG[output])]
        places = [STATE.index(name) for name in names]
        sent = [state[:, place] for place in places] + ([] if columns is None else [columns])
        received = self.ranks.gather(torch.stack([x.float() for x in sent], -1))
        states = state.new_zeros((self.ranks.count, *state.shape))
        for k, place in enumerate(places):  # not by a list, which would be copied to a GPU, and waited for
            states[:, :, place] = received[:, :, k].double()
        states[:, :, STATE.index("argmax")] += self.starts.unsqueeze(-1)
        merged = merge(states, inverse)
        merged[:, STATE.index("sum_logit")] /= self.vocab if columns is None else received[:, :, -1].double().sum(0)
        return merged
