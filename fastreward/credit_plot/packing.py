"""Arrays as text that a page can hold: byte planes, compressed, in base64.

The bytes of equal significance lie together: the high ones of most values are much alike, and compress. A float keeps
its 24 highest bits, which is five digits in all of float32's range, infinities and NaN included.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray


class Packed(TypedDict):
    """type: of the values (f4, i4). planes: bytes that each still has, the highest. data: base64 of zlib of them."""

    type: str
    planes: int
    length: int
    data: str


def packed_floats(values: NDArray[np.float32]) -> Packed:
    """float32 in 24 bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + np.uint32(0x7F) + ((bits >> np.uint32(8)) & np.uint32(1))) & np.uint32(0xFFFFFF00)
    rounded = np.where(np.isfinite(values), rounded, bits)
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded).astype("<u4")
    return _packed("f4", rounded.view("u1").reshape(-1, 4)[:, 1:])


def packed_integers(values: NDArray[Any]) -> Packed:
    """int32."""
    return _packed("i4", np.ascontiguousarray(values, dtype="<i4").view("u1").reshape(-1, 4))


def _packed(kind: str, planes: NDArray[np.uint8]) -> Packed:
    # Mantissas hardly compress: a higher level would take three times as long for 1 %.
    data = zlib.compress(np.ascontiguousarray(planes.T).tobytes(), 1)
    return {
        "type": kind,
        "planes": planes.shape[1],
        "length": planes.shape[0],
        "data": base64.b64encode(data).decode("ascii"),
    }
