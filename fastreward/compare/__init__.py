"""Rollout against trainer: how far two sides' log-probs, top-k log-probs or logits are apart, and what may be wrong.

files.py reads what is on disk, load.py makes a side of it, pair.py finds which token belongs to which, measure.py reads
both sides once, diagnose.py looks for faults in what was measured, report.py and plot.py show it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastreward._arguments import check
from fastreward._arguments.numbers import Number

if TYPE_CHECKING:
    from fastreward.compare.report import Comparison


def compare(
    a: Any,
    b: Any,
    *,
    mask: Any = None,
    tokens: Any = None,
    cu_seqlens: Any = None,
    temperature_a: Number = 1.0,
    temperature_b: Number = 1.0,
    tolerance: float = 0.0,
    top: int = 20,
    key_a: str | None = None,
    key_b: str | None = None,
    step: Callable[[int, int], None] | None = None,
) -> Comparison:
    """How far the log-probs of a rollout engine (a) are from the trainer's (b), and which known fault explains it.

    Each side is the path of a file (.safetensors, .npz, .pt, .jsonl), a tensor or array, or a mapping of names to
    these. A tensor [B, T] (or [N] with cu_seqlens) has log-probs of the chosen tokens, [B, T, V] (or [N, V]) logits.
    A mapping or file has logprobs [B, T]; or top_logprobs and top_ids [B, T, k] (ids below 0: nothing there); or logits
    [B, T, V]; and if you like tokens, mask [B, T], lengths [B], cu_seqlens [B + 1]. The names under which TRL and verl
    keep log-probs are known too: rollout_log_probs, sampling_per_token_logps, ... for a; old_log_probs,
    old_per_token_logps, ... for b, so that one file may be both sides. In .jsonl each line is a sequence, with lists; a
    token's top_logprobs may be {id: log-prob}, or vLLM's {id: {"logprob": ...}}, under its names logprobs and token_ids
    too.
    Where one side says more than the other it is asked for what the other says: chosen log-probs are looked up in
    logits, given the tokens.

    Args:
        a, b: float32, bfloat16, float16 or float64; logits of float64 are rounded to float32.
        mask: [B, T] (or [N]), nonzero = a token that counts, for a side that has none; with one on either side alone it
            is both sides'. None at all: everything counts. The k-th token that counts in a sequence of a is compared
            with the k-th of b, so one side may be packed and the other padded.
        tokens: integers in the same shape, the chosen ids, for a side that has none.
        cu_seqlens: integers [B + 1]: both sides are packed.
        temperature_a, temperature_b: logits are divided by it; only of sides that have logits.
        tolerance: the first differing token of a sequence is the first beyond it; 0: not equal to the last bit.
        top: how many of the largest logits are looked at for overlap and faults.
        key_a, key_b: under which name that side's log-probs or logits are, where it is none of the above.
        step: told how many tokens of how many have been read.

    Returns:
        Comparison: print it; totals (KL and total variation, exact from logits, bounds from top-k, estimates from the
        chosen tokens; largest and p99 difference, overlap, share of equal bits, effective sample sizes), the same
        per_token, first_difference, faults with their evidence, verdict, to_dict(), plot(path). Faults that are looked
        for: padding (at the other end), shift (by up to three tokens), temperature, processed (renormalised after top-k
        or top-p), kept-set (-inf on one side), rounding (to bfloat16 or float16). Differences like those of bfloat16
        forward passes, or of other weights, are no fault, and the verdict says which of both they look like.
        Everything is computed on the CPU; each side is read once, a chunk of tokens at a time, and again only where its
        tokens turn out to belong elsewhere.

    Raises:
        TypeError, ValueError: a file that can't be read, names that are not there, wrong dtypes or shapes, another
            number of sequences or vocabulary, NaN where a token counts, log-probs above 0; names the side.

    >>> import torch, fastreward as fr
    >>> trainer = torch.log_softmax(torch.arange(320.0).reshape(1, 64, 5).sin() * 3, -1)  # [B, T, V]
    >>> fr.compare(trainer / 0.7, trainer).faults[0].name
    'temperature'
    """
    from fastreward.compare.run import run

    if step is not None and not callable(step):
        raise TypeError(f"step: expected a function of (done, total), got {step!r}")
    if check.whole("top", top, "ids per token") < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    temperatures = (check.positive("temperature_a", temperature_a), check.positive("temperature_b", temperature_b))
    return run(
        (_path(a), _path(b)),
        (key_a, key_b),
        {"mask": mask, "tokens": tokens, "cu_seqlens": cu_seqlens},
        temperatures,
        check.not_negative("tolerance", tolerance),
        top,
        step,
    )


def _path(given: Any) -> Any:
    return Path(given) if isinstance(given, str) else given
