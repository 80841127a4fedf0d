"""Types of the C++ extension (csrc/bindings); integers named after tensors are data pointers, 0 = not given."""

from enum import Enum
from typing import Any

class DType(Enum):
    f32 = 0
    bf16 = 1
    f16 = 2

class LogprobsRows:
    columns: int
    dtype: DType
    inv_temperature: int
    inv_temperature_scalar: float
    inv_temperature_stride: int
    keep_count: int
    keep_ids: int
    keep_ids_stride: int
    keep_mask: int
    keep_mask_stride: int
    labels: int
    logits: int
    mask: int
    row_stride: int
    rows: int
    threads: int
    token_count: int
    token_ids: int
    token_ids_stride: int
    def __init__(self) -> None: ...

class KeptMemory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def balance(lengths: int, count: int, parts: int, equal_size: bool, order: int, starts: int) -> None: ...
def group_advantages(
    rewards: int,
    rewards_f64: bool,
    rows: int,
    components: int,
    group_index: int,
    group_size: int,
    lengths: int,
    component_weights: int,
    center_values: int,
    scale_values: int,
    center: int,
    scale: int,
    ddof: int,
    eps: float,
    eps_inside: bool,
    singleton: int,
    normalize: int,
    advantages: int,
    threads: int,
) -> None: ...
def group_statistics(
    x: int,
    x_f64: bool,
    rows: int,
    group_index: int,
    group_size: int,
    weights: int,
    exponentials: bool,
    statistics: int,
    threads: int,
) -> None: ...
def ids_below(ids: int, count: int, limit: int) -> bool: ...
def mask_count(mask: int, mask_kind: int, positions: int, threads: int) -> int: ...
def mask_flags(mask: int, mask_kind: int, rows: int, columns: int, flags: int, counts: int, threads: int) -> bool: ...
def number_labels(labels: list[Any], index: int, looked_at: bool) -> bool: ...
def number_integers(labels: int, rows: int, absent: bool, index: int) -> int: ...
def isa() -> str: ...
def set_worth_waking(microseconds: int) -> int: ...
def logprobs_backward(
    rows: LogprobsRows,
    values: int,
    grad_values: int,
    grad_ids: int,
    grad_logits: int,
    grad_stride: int,
    inv_softcap: float,
) -> None: ...
def logprobs_finish(
    state: int,
    inv_temperature: int,
    inv_temperature_stride: int,
    inv_temperature_scalar: float,
    rows: int,
    vocab_size: int,
    flags: int,
    values: int,
    indices: int,
) -> None: ...
def logprobs_accumulate(rows: LogprobsRows, vocab_start: int, flags: int, label_logits: int, state: int) -> None: ...
def logprobs_forward(rows: LogprobsRows, flags: int, values: int, indices: int, id_logprobs: int) -> None: ...
def token_rewards(
    scores: int,
    logprobs: int,
    ref_logprobs: int,
    mask: int,
    mask_kind: int,
    sequences: int,
    columns: int,
    cu_seqlens: int,
    kl: int,
    place: int,
    numbers: list[float],
    out: int,
    threads: int,
) -> bool: ...
def returns_scan(
    tensors: list[int],
    numbers: list[float],
    options: list[int],
    rows: int,
    columns: int,
    out: int,
    second: int,
    threads: int,
) -> bool: ...
def whiten_apply(
    x: int,
    mask: int,
    mask_kind: int,
    rows: int,
    columns: int,
    shift: float,
    scale: float,
    offset: float,
    out: int,
    threads: int,
) -> None: ...
def whiten_statistics(
    x: int, mask: int, mask_kind: int, rows: int, columns: int, threads: int
) -> tuple[float, float, float]: ...
def segment_reduce(
    rows: int,
    columns: int,
    bounds: int,
    segments: int,
    x: int,
    ids: int,
    id_kind: int,
    weights: int,
    weight_kind: int,
    op: int,
    temperature: float,
    empty: float,
    out: int,
    threads: int,
) -> int: ...
def segment_adjoint(
    rows: int,
    columns: int,
    bounds: int,
    segments: int,
    x: int,
    ids: int,
    id_kind: int,
    weights: int,
    weight_kind: int,
    op: int,
    temperature: float,
    values: int,
    out: int,
    threads: int,
) -> int: ...
def segment_ids(
    rows: int,
    columns: int,
    bounds: int,
    mask: int,
    labels: int,
    label_kind: int,
    marks: int,
    mark_kind: int,
    tail: bool,
    out: int,
    threads: int,
) -> None: ...

TokensCode = tuple[int, int, int, int, int]

class Program:
    def __init__(
        self,
        *,
        sides: int,
        numbers: int,
        columns: int,
        constants: list[tuple[int, float]],
        scalars: list[int],
        inputs: list[tuple[int, int]],
        prologue: list[tuple[int, ...]],
        stages: list[tuple[list[tuple[Any, ...]], list[tuple[int, ...]]]],
        outputs: list[int],
        batch: list[int],
    ) -> None: ...
    @property
    def code(self) -> int: ...

def program_token_operators() -> dict[str, int]: ...
def program_mask_operators() -> dict[str, int]: ...
def program_sequence_operators() -> dict[str, int]: ...
def program_run(
    *,
    program: Program,
    sides: list[TokensCode],
    inputs: list[int],
    scalars: list[float],
    groups: int,
    outputs: list[int],
    batch: int,
    threads: int,
) -> None: ...
def program_threshold(tokens: TokensCode, x: int, bound: float, share: bool, threads: int) -> float: ...
def program_scale(
    tokens: TokensCode, saved: int, sequence_weight: int, factor: float, out: int, threads: int
) -> None: ...
def program_broadcast_to_tokens(
    tokens: TokensCode, sequence_values: int, factor: float, out: int, threads: int
) -> None: ...
def divergence_forward(
    *,
    student: object,
    teacher: object,
    code: int,
    made: list[int],
    inputs: list[int],
    scalars: list[float],
    moments: list[tuple[float, ...]],
    student_flags: int,
    teacher_flags: int,
    known: bool,
    student_values: int,
    teacher_values: int,
    student_indices: int,
    teacher_indices: int,
    outputs: list[int],
) -> None: ...
def divergence_backward(
    *,
    student: object,
    teacher: object,
    code: int,
    made: list[int],
    inputs: list[int],
    scalars: list[float],
    terms: list[tuple[int, float, list[int]]],
    student_values: int,
    teacher_values: int,
    label_gradients: int,
    grad_logits: int,
    grad_stride: int,
) -> None: ...
def divergence_head_share(
    *,
    student: object,
    teacher: object,
    student_values: int,
    teacher_values: int,
    alpha: float,
    shares: int,
) -> None: ...
def logits_policy_loss(
    *,
    rows: LogprobsRows,
    code: int,
    inputs: list[int],
    logprob: int,
    entropy: int,
    logprob_gradient: int,
    entropy_gradient: int,
    scalars: list[float],
    scale: float,
    logprobs: int,
    entropies: int,
    grad_logits: int,
    grad_stride: int,
) -> None: ...

Forest = tuple[int, int, int, int, int, int]  # nodes, stride of their fields, nodes, rows, rows, unique tokens
Span = tuple[int, int, int]  # extents, mask, its kind
AggregateOptions = tuple[int, bool, bool, float, float]  # op, over children, mean form, scale, discount
AdvantageOptions = tuple[int, bool, bool, int, float]  # mode, scale by std, raw singletons, ddof, eps

class PrefixTreeGrowth:
    grown: bool
    size: int
    groups: int
    tokens: int
    def __init__(
        self,
        tokens: int,
        tokens_i64: bool,
        parent_row: int,
        branch_position: int,
        group: int,
        ordered_groups: bool,
        rows_data: int,
        rows: int,
        compress: bool,
        threads: int,
    ) -> None: ...
    def number(self, nodes: int, capacity: int) -> None: ...

def prefix_tree_lengths(
    mask: int, kind: int, extents: int, starts: int, rows: int, lengths: int, threads: int
) -> None: ...
def prefix_tree_starts(mask: int, kind: int, extents: int, rows: int, starts: int, threads: int) -> None: ...
def prefix_tree_aggregate(
    forest: Forest,
    options: AggregateOptions,
    f64: bool,
    values: int,
    weights: int,
    child_weights: int,
    out: int,
    threads: int,
) -> None: ...
def prefix_tree_aggregate_backward(
    forest: Forest,
    options: AggregateOptions,
    f64: bool,
    values: int,
    weights: int,
    child_weights: int,
    grad: int,
    grad_values: int,
    threads: int,
) -> None: ...
def prefix_tree_advantages(
    forest: Forest, options: AdvantageOptions, f64: bool, values: int, out: int, threads: int
) -> None: ...
def prefix_tree_propagate(
    forest: Forest, bounds: tuple[float, float, float], f64: bool, scale: int, shift: int, out: int, threads: int
) -> None: ...
def prefix_tree_propagate_backward(
    forest: Forest,
    bounds: tuple[float, float, float],
    f64: bool,
    scale: int,
    shift: int,
    grad: int,
    grad_scale: int,
    grad_shift: int,
    threads: int,
) -> None: ...
def prefix_tree_broadcast_to_tokens(
    forest: Forest, span: Span, place: int, f64: bool, values: int, row_values: int, tokens: int, threads: int
) -> None: ...
def prefix_tree_collect(
    forest: Forest, span: Span, place: int, f64: bool, tokens: int, values: int, threads: int
) -> None: ...
def prefix_tree_gather(forest: Forest, span: Span, f64: bool, unique: int, tokens: int, threads: int) -> None: ...
def prefix_tree_scatter_reduce(
    forest: Forest, span: Span, op: int, f64: bool, tokens: int, unique: int, threads: int
) -> None: ...
def prefix_tree_node_of_token(forest: Forest, extents: int, out: int, threads: int) -> None: ...
def prefix_tree_unique_of_token(forest: Forest, extents: int, out: int, threads: int) -> None: ...
def prefix_tree_layout(
    forest: Forest,
    tokens: int,
    tokens_i64: bool,
    token_ids: int,
    position_ids: int,
    parent: int,
    tout: int,
    multiplicity: int,
    source: int,
    threads: int,
) -> None: ...
def prefix_tree_bins(forest: Forest, max_tokens: int, by_rows: bool, bins: int) -> int: ...
def prefix_tree_blocks(
    tout: int, tokens: int, block: int, counts: int, indices: int, full_counts: int, full_indices: int
) -> None: ...
