"""Names of a loss program's values in generated Triton source."""

from __future__ import annotations

import keyword

from fastreward.language import names as shared
from fastreward.language.ops import words
from fastreward.language.program import Program

#: What the generated functions use themselves.
_TAKEN = """
    tl triton range float True expm1_minus truth divide row_bounds before tile_columns wide add count most sum_of
    most_of store_partial is_last NOTHING column store_column largest smallest merge_chunks group_reduce
    group_select batch_permute SUM MAX MIN OTHERS BEFORE AFTER mask cu_seqlens batch columns values order starts
    groups counter N B T row_units chunks chunk program programs PACKED HAS_MASK ROWS STEPS LANES VEC BLOCK_ROWS
    TILE row row_ok start tokens extent offsets t0 t at inside valid b logits logits_units labels inv_t
    inv_t_stride row_of_token grad_scale logprobs entropies grad_logits grad_units vocab_units V HAS_INV_T
    LOGITS_UNIT GRAD_UNIT index token statistics store_gradient zero_row inverse_temperature own_logprob own_entropy
    scan shift back tiles False g_logprob g_entropy scale label logits_row grad_row inverse64 top top_logprob
    teacher_logits teacher_units teacher_inv_t teacher_inv_t_stride student teacher outputs agreement label_gradients
    at_label x_row y_row x_top x_inverse x_top_logprob y_top y_inverse y_top_logprob x y x_ahead y_ahead columns units
    blocks block done here exists n OUTPUTS BLOCK P Q P_LOG Q_LOG MOMENTS STATISTICS TEACHER_UNIT HAS_TEACHER_INV_T
    HAS_LABEL teacher_inverse64 of_p of_q log_p_of_p log_q_of_q far again grad sums terms gradient lane_columns
    scan_map shift_map tile_slot store_map carried maps slot slots share first place ahead SHARED
    over_lane lane_units quick_exp quick_log log_prob shape_of store_masked_pair NEG_INF
"""


#: What is put behind a value's name: its tensor, its running sums, what its scan carries, itself in f64, a tile's map.
ENDINGS = ("_ptr", "_lanes", "_carry", "_wide", "_factor", "_term")


def names(program: Program) -> dict[int, str]:
    """A name for every node of the program, each a Python identifier of its own, as are those with an ending."""
    return shared.names(program, (*words("triton"), *_TAKEN.split(), *keyword.kwlist), ENDINGS)
