"""Recipes of rewards and credit beside the same in plain loops. How a recipe gets its tests:

1. `tests/support/reference_credit/<file>.py`: one function of the recipe's name, in plain Python on nested lists and
   floats, written from the formula page and not from the recipe: loops, no torch. It takes the recipe's arguments by
   name and returns a list [B], or a list of lists [B][T] with 0.0 where the mask is 0.
2. `tests/support/credit_cases/<file>.py`: `CASES`, name -> Case ("rlpr", "rlpr, sum": a case for each option that
   changes the formula), and `MARKS`, recipe -> "paper", "note" or "reconstructed" for what was not read in code.
   A file here is found by its being here.
3. `tests/recipes/published_defaults/<file>.toml`: the recipe's options by the page, and under [silent] those that it
   does not state.
4. An argument that the example of a recipe does not know yet: `fastreward/recipes/_catalogue/inputs.py`.

    def _arguments(rng):  # whatever is random comes from `rng`
        mask = rollout_mask(rng)  # [8, 6]: ragged, with holes, a full row, an empty row
        return {
            "logprobs": floats(rng, mask=mask),  # NaN where the mask is 0: it must not matter
            "rewards": scores(rng),  # [8]; nan=True: some responses are not scored
            "mask": mask,
            "group_ids": groups(rng),  # 8 labels: unequal groups, a singleton, not contiguous
        }

    CASES = {"method": Case(recipes.method, reference.method, _arguments, unmoved_by_shift=("rewards",))}

`tests/recipes/test_credit.py` compares recipe and reference on two seeds, on the CPU, and the Triton kernels in the
interpreter once (a case of each recipe). It puts every case through what must hold for all, without being asked:
rows in another order give the
same in that order; a group without the others gives the same bits; so do padding on both sides and other values under a
mask; results are float32 (or bool) and 0 under the mask; no rows and no columns are no error; where the recipe takes
cu_seqlens, packed is padded. A mask is an argument "mask" or "..._mask" [B, W] (segment_ids, where there is none), and
what has its two sizes first is aligned with it: give two masks of one call different widths (`columns=`). Fields of
Case that say what else holds, or that one of these does not, are described there.
"""

from __future__ import annotations

import importlib
import pkgutil

from credit_cases.case import Case

CASES: dict[str, Case] = {}
MARKS: dict[str, str] = {}
for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    CASES |= getattr(_module, "CASES", {})
    MARKS |= getattr(_module, "MARKS", {})
