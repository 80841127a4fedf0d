"""Divergences of two rows of logits in Triton: their sums over the vocabulary, and the gradient for either side.

Fused: both softmaxes, their statistics, the divergence and the sums that its gradient needs; then all operators of the
gradient. No tensor of the size of the logits is made. One program per row; its bits depend on V and nothing else.

Reads: where the divergence is made of moments (the KLs, `language.divergence_moments`) each logit is read once, and
again in rows in which a token of weight has a log-prob below -10,000, such as one that only the teacher forbids. Others
(Jensen-Shannon, total variation, ...) need both normalisers first. The second read goes backwards, from what the L2
cache holds: of 2 e V bytes a row, e per logit, and two or three rows an SM. At V = 151,936 in bf16 that is 160 MB or
240 MB on an H200, which has 50 MB of L2: a fifth to a third of the second read comes from there, at 32,768 columns
nearly all. Fewer rows under way would leave more of them there, but too little in flight.

Bytes a row, e = bytes per logit of a side: forward 2 e V with moments, 4 e V without, of which the L2 serves what it
can; backward 3 e V; a masked row is not read.

Raw functions: `forward`, `backward`, and `sums` of a slice of the vocabulary, given the statistics of whole rows.
"""

from fastreward._runtime.head_share import head_share

from .launch import backward, forward, sums

__all__ = ["backward", "forward", "head_share", "sums"]
