"""The operators of the loss language as device functions: f32 for what is per token, f64 for what is per sequence.

Which one is meant follows from the argument's type. Nothing here needs libdevice, which Triton's interpreter does not
have. f32 results are good to about 2 ulp, f64 ones to 1e-15 and better. NaN goes through everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF: tl.constexpr = tl.constexpr(float("inf"))
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_LN2_HIGH: tl.constexpr = tl.constexpr(0.693145751953125)  # ln 2 in 17 bits: exact times any exponent
_LN2_LOW: tl.constexpr = tl.constexpr(1.42860677e-06)
_LOG2E_HIGH: tl.constexpr = tl.constexpr(1.4426950216293335)  # log2(e) as f32, and what that leaves out
_LOG2E_LOW: tl.constexpr = tl.constexpr(1.92596299112661e-08)
_HALF_ROOT_BITS: tl.constexpr = tl.constexpr(0x3F3504F3)  # sqrt(1/2) as f32
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def exp(x):
    """e^x. f32: exp2 of x * log2(e) with the product's rounding error put back, which `tl.exp` leaves out."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        high = x * _LOG2E_HIGH
        low = tl.fma(x, _LOG2E_HIGH, -high) + x * _LOG2E_LOW
        low = tl.where(tl.abs(high) == INF, 0.0, low)
        return tl.exp2(high) * (1.0 + low * _LN2)


@triton.jit
def _taylor(x, FROM: tl.constexpr):
    """(FROM - 1)! * (1 / (FROM - 1)! + x / FROM! + x^2 / (FROM + 1)! + ...) for |x| < 1/2."""
    p = x * 0.0 + 1.0
    if x.dtype == tl.float64:
        for n in tl.static_range(16, FROM - 1, -1):
            p = 1.0 + x * (1.0 / n) * p
    else:
        for n in tl.static_range(9, FROM - 1, -1):
            p = 1.0 + x * (1.0 / n) * p
    return p


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0."""
    return tl.where(tl.abs(x) < 0.5, x * _taylor(x, 2), exp(x) - 1.0)


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x without cancellation near 0: the k3 estimate of a KL."""
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * _taylor(x, 3), exp(x) - 1.0 - x)


@triton.jit
def _split32(x):
    """(f, e) with x = (1 + f) * 2^e and 1 + f within [sqrt(1/2), sqrt(2)), for positive f32."""
    small = x < _SMALLEST_NORMAL
    bits = tl.where(small, x * 33554432.0, x).to(tl.int32, bitcast=True)
    e = (bits - _HALF_ROOT_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    return f, e.to(tl.float32) - tl.where(small, 25.0, 0.0)


@triton.jit
def _log32(f, e, x):
    """log((1 + f) * 2^e) by the series of atanh, for x = that product; -inf at x = 0, NaN below."""
    s = f / (2.0 + f)
    z = s * s
    rest = z * (2.0 / 3.0 + z * (2.0 / 5.0 + z * (2.0 / 7.0 + z * (2.0 / 9.0 + z * (2.0 / 11.0)))))
    value = e * _LN2_HIGH + (f - (s * (f - rest) - e * _LN2_LOW))
    return tl.where(x == INF, x, tl.where(x > 0.0, value, tl.where(x == 0.0, -INF, float("nan"))))


@triton.jit
def log(x):
    """Natural logarithm: -inf at 0, NaN below."""
    return tl.log(x)


@triton.jit
def log1p(x):
    """log(1 + x) without cancellation near 0."""
    u = 1.0 + x
    if x.dtype == tl.float64:
        lost = (x - (u - 1.0)) * (1.0 / u.to(tl.float32)).to(tl.float64)  # what 1 + x rounded away, over u
        return tl.log(u) + tl.where((u > 0.0) & (u < INF), lost, 0.0)
    else:
        f, e = _split32(u)
        near = (x > -0.29) & (x < 0.41)
        return _log32(tl.where(near, x, f), tl.where(near, 0.0, e), u)


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    t = expm1(-2.0 * tl.abs(x))
    y = -t / (2.0 + t)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def logsigmoid(x):
    """log(sigmoid(x)) without overflow."""
    return tl.where(x < 0.0, x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def minimum(x, y):
    """The smaller; NaN where either is."""
    return tl.where(x < y, x, tl.where(x == x, y, x))


@triton.jit
def maximum(x, y):
    """The larger; NaN where either is."""
    return tl.where(x > y, x, tl.where(x == x, y, x))


@triton.jit
def clip(x, low, high):
    """x within [low, high]."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def truth(condition):
    """A scalar condition as Triton's interpreter needs it: it would broadcast that of a comparison as a float."""
    return tl.where(condition, 1, 0) != 0


@triton.jit
def divide(x, y):
    """x / y in f64 by Newton's steps: the hardware's division is a subroutine, and calls cost registers.

    A subnormal y counts as 0.
    """
    bits = y.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) & 0x7FF
    ordinary = (exponent != 0) & (exponent != 0x7FF)
    m = tl.where(ordinary, bits - ((exponent - 1023) << 52), bits).to(tl.float64, bitcast=True)  # 1 <= |m| < 2
    r = (1.0 / m.to(tl.float32)).to(tl.float64)
    r = r * (2.0 - m * r)
    r = r * (2.0 - m * r)
    r = tl.where(ordinary, r, 1.0 / y.to(tl.float32))  # 0, infinite or NaN: its inverse needs no digits
    q = x * r
    rest = tl.fma(-q, m, x) * r
    q = tl.where(tl.abs(rest) < INF, q + rest, q)
    down = tl.where(ordinary, 1023 - exponent, 0)  # in two halves that do not overflow
    half = down >> 1
    return q * _power_of_2(half) * _power_of_2(down - half)


@triton.jit
def _power_of_2(n):
    """2^n as f64 for -1022 <= n <= 1023."""
    return ((n + 1023) << 52).to(tl.float64, bitcast=True)
