"""Raw functions of logprobs on CUDA tensors: allocation and launch plan. The kernels: csrc/cuda/logprobs.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreward._runtime.layout import FLAG, VALUES
from fastreward.cuda._launch import MAX_SHARED_BYTES, Member, has_clusters, launch, multiprocessors, pack

_SOURCE = "logprobs"
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# As in the sources.
_FORWARD_THREADS = 512
_SLICES = 8
_UNROLL = 2
_BACKWARD_THREADS = 256
_KEPT_THREADS = 128
#: Shorter rows are one slice; the kernel's bits depend on V through this and nothing else.
_SLICED_FROM = 32_768


def forward(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of every row: values f32 [8, N], indices i64 [2, N], id_logprobs f32 [N, K]."""
    rows, device = logits.shape[0], logits.device
    ids = _columns(token_ids)
    values = torch.empty((len(VALUES), rows), dtype=torch.float32, device=device)
    indices = torch.empty((2, rows), dtype=torch.int64, device=device)
    id_logprobs = torch.empty((rows, 0 if ids is None else ids.shape[1]), dtype=torch.float32, device=device)
    _launch_forward(
        logits, labels, inv_temperature, mask, _columns(keep_mask), _columns(keep_ids), ids, flags,
        outputs=(values, indices, id_logprobs),
    )  # fmt: skip
    return values, indices, id_logprobs


def accumulate(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    inv_temperature: float | Tensor,
    state: Tensor,
    flags: int,
    label_logits: Tensor | None,
) -> None:
    """Merges columns vocab_start .. vocab_start + Vc (logits [N, Vc]) into state f64 [N, 8]."""
    _launch_forward(
        logits, labels, inv_temperature, None, None, None, None, flags,
        state=state, vocab_start=vocab_start, label_logits=label_logits,
    )  # fmt: skip


def finish(state: Tensor, inv_temperature: float | Tensor, vocab_size: int, flags: int) -> tuple[Tensor, Tensor]:
    """From state f64 [N, 8] to values f32 [8, N] and indices i64 [2, N]."""
    rows, device = state.shape[0], state.device
    values = torch.empty((len(VALUES), rows), dtype=torch.float32, device=device)
    indices = torch.empty((2, rows), dtype=torch.int64, device=device)
    if rows:
        arguments = pack(state, rows, vocab_size, *_scale(inv_temperature), values, indices, flags)
        launch(_SOURCE, "logprobs_finish", -(-rows // 256), 256, arguments, device, define="FASTREWARD_ONLY_F32")
    return values, indices


def backward(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    token_ids: Tensor | None,
    values: Tensor,
    id_logprobs: Tensor,
    grad_values: Tensor,
    grad_ids: Tensor | None,
    grad_logits: Tensor,
    inv_softcap: float = 0.0,
) -> None:
    """Writes grad_logits [N, V], which may be `logits` itself."""
    del id_logprobs  # their gradient needs the row's logsumexp only
    rows, vocab = logits.shape
    if rows == 0 or vocab == 0:
        return
    name, ids, kept = _TYPES[logits.dtype], _columns(token_ids), _columns(keep_ids)
    if grad_ids is None:
        ids = None
    entries = 0 if kept is None else kept.shape[1]
    shared = 4 * (entries if kept is not None else 1 + (0 if ids is None else ids.shape[1]))
    if shared > MAX_SHARED_BYTES:
        raise ValueError(
            f"fastreward: at most {MAX_SHARED_BYTES // 4 - 1} ids per row on the cuda backend, got {shared // 4}"
        )
    chunk, chunks = _shares(rows, vocab, logits)
    if kept is not None:
        kernel, grid, block = f"logprobs_backward_{name}_ids", rows, _KEPT_THREADS
    else:
        kernel, grid, block = f"logprobs_backward_{name}", rows * chunks, _BACKWARD_THREADS
    keep = _columns(keep_mask)
    arguments = pack(
        logits, logits.stride(0), rows, vocab, labels.contiguous(), *_scale(inv_temperature),
        None if mask is None else mask.contiguous(), *_rows_of(keep), *_rows_of(kept), entries,
        *_rows_of(ids), 0 if ids is None else ids.shape[1], values.contiguous(), grad_values.contiguous(),
        None if grad_ids is None else grad_ids.contiguous(), grad_logits, grad_logits.stride(0),
        float(inv_softcap), chunk, chunks,
    )  # fmt: skip
    launch(
        _SOURCE, kernel, grid, block, arguments, logits.device, shared=shared, define=f"FASTREWARD_ONLY_{name.upper()}"
    )


def _launch_forward(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_ids: Tensor | None,
    ids: Tensor | None,
    flags: int,
    *,
    outputs: tuple[Tensor, Tensor, Tensor] | None = None,
    state: Tensor | None = None,
    vocab_start: int = 0,
    label_logits: Tensor | None = None,
) -> None:
    """One block per row, or a cluster of them where the rows alone would leave multiprocessors idle."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    name, device = _TYPES[logits.dtype], logits.device
    sweeps = _sweeps(vocab, _lanes(logits))
    if keep_ids is not None:
        what, grid, block = "ids", rows, _KEPT_THREADS
    else:
        what, grid, block = _variant(flags, keep_mask is not None), rows, _FORWARD_THREADS
        if vocab >= _SLICED_FROM and has_clusters(device) and rows < 2 * multiprocessors(device):
            what, grid = f"{what}_cluster", rows * _SLICES
    arguments = pack(
        logits, logits.stride(0), rows, vocab, labels.contiguous(), *_scale(inv_temperature),
        None if mask is None else mask.contiguous(), *_rows_of(keep_mask), *_rows_of(keep_ids),
        0 if keep_ids is None else keep_ids.shape[1], *_rows_of(ids), 0 if ids is None else ids.shape[1],
        *(outputs or (None, None, None)), state, vocab_start,
        None if label_logits is None else label_logits.contiguous(), flags, sweeps,
    )  # fmt: skip
    define = f"FASTREWARD_ONLY_{name.upper()}"
    launch(_SOURCE, f"logprobs_forward_{name}_{what}", grid, block, arguments, device, define=define)


def _variant(flags: int, keep: bool) -> str:
    """The cheapest kernel that computes what `flags` asks for."""
    if keep:
        return "keep"
    if flags & ~(FLAG["entropy"] | FLAG["argmax"]):
        return "everything"
    return "entropy" if flags else "lean"


def _lanes(logits: Tensor) -> int:
    return 16 // logits.element_size()


def _sweeps(vocab: int, lanes: int) -> int:
    """Sweeps of a slice (a sweep is one 16-byte vector per thread), a multiple of _UNROLL: a function of V alone."""
    sweeps = -(-vocab // (lanes * _FORWARD_THREADS))
    slices = _SLICES if vocab >= _SLICED_FROM else 1
    return -(-sweeps // (slices * _UNROLL)) * _UNROLL


def _shares(rows: int, vocab: int, logits: Tensor) -> tuple[int, int]:
    """Vectors in a block's share of a row, and shares per row: smaller for few rows. No bit depends on it."""
    vectors = vocab // _lanes(logits)
    blocks = 4 * multiprocessors(logits.device)
    chunk = next((c for c in (8192, 4096, 2048) if rows * -(-vectors // c) >= 4 * blocks), 1024)
    return chunk, max(1, -(-vectors // chunk))


def _columns(x: Tensor | None) -> Tensor | None:
    """x [N, K] with unit column stride (any row stride)."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _rows_of(x: Tensor | None) -> tuple[Member, int]:
    return (None, 0) if x is None else (x, x.stride(0))


def _scale(inv_temperature: float | Tensor) -> tuple[Member, int, float]:
    """(pointer, stride, value): per-row f64 tensor, or one number."""
    if isinstance(inv_temperature, Tensor):
        scale = inv_temperature.double()
        return scale, scale.stride(0) if scale.ndim else 0, 1.0
    return None, 0, float(inv_temperature)
