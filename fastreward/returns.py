"""Returns, GAE, lambda-returns and V-trace: one linear recurrence over the tokens of a row.

y_t = x_t + c_t y_{t+1}: rewards of later tokens, discounted, counted for the tokens before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.arrays import accepts_arrays
from fastreward._arguments.numbers import Number, joined_all, number, split_all
from fastreward._arguments.options import (
    AT_MASKED,
    MASKED_REWARDS,
    RETURNS_OPS,
    AtMasked,
    MaskedRewards,
    ReturnsInputs,
    ReturnsOp,
    ReturnsOptions,
)
from fastreward._arguments.tokens import one_per_token, token_bounds
from fastreward._runtime import returns as ops
from fastreward._runtime.dispatch import select
from fastreward._runtime.masks import count_valid
from fastreward.distributed.ranks import Ranks, refused_together
from fastreward.distributed.sequence_parallel import SHARDINGS, Shard, Sharding, sharded_scan
from fastreward.whiten import check_counted
from fastreward.whiten import whiten as whiten_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# --------------------------------------------------------------------------------------------------- public functions
@accepts_arrays
@refused_together
def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: Number = 1.0,
    at_masked: AtMasked = "carry",
    reverse: bool = True,
    op: ReturnsOp = "sum",
    temperature: Number | None = None,
    initial: Tensor | None = None,
    masked_rewards: MaskedRewards = "to-last-valid",
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    sharding: Sharding = "contiguous",
) -> Tensor:
    """y_t = r_t + gamma_t y_{t+1}: the discounted rewards from each token on.

    Args:
        rewards: [B, T], or packed [N] with cu_seqlens; any real dtype, computed with in float32. Finite where valid.
        mask: the shape of rewards, nonzero = the policy's own token. Other tokens get 0, and what lies there does not
            matter, NaN included; only rewards may still count (masked_rewards).
        gamma: discount; a number, a 0-d tensor, [B], or the shape of rewards, which makes it the general linear
            recurrence y_t = x_t + c_t y_{t+1}.
        at_masked: what happens to the later rewards at a masked token, such as a tool's, between valid ones:
            "carry": nothing, it is skipped (verl, TRL, NeMo-RL).
            "zero": it takes time; it is a token with reward 0, and discounts.
            "decay": as "zero", and it keeps its result (OpenRLHF).
            "reset": they end there (SkyRL).
        reverse: False runs from the left: y_t = r_t + gamma_t y_{t-1}.
        op: "min", "max" or "logsumexp" in place of the sum, y_t = min(r_t, gamma_t y_{t+1}). "min" is min-form credit
            (PURE, arXiv 2504.15275); masked tokens have no reward then, whatever masked_rewards says.
        temperature: makes "min" and "max" soft: temperature * logsumexp(. / temperature), with minus signs for "min".
            Positive; 1 for "logsumexp".
        initial: [B], what lies beyond the last valid token (the first, with reverse=False).
        masked_rewards: a reward on a masked token is moved "to-last-valid", the valid token before it, so that none
            is lost (a NaN there is none), or it is "drop"ped (verl, OpenRLHF). One before the first valid token is no
            token's doing and never counts.
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N. Where N == B see `policy_loss`.
        out: where the result goes; float32, contiguous, memory of its own.
        process_group: each rank holds a part of every row's tokens (context parallelism), in rank order and of any
            length, 0 too; what is [B] is the same on every rank. Results are those of one process to 1e-6: what crosses
            is one carry (a, b) per row and rank, the recurrence y -> a + b y, and five numbers about its ends. Sums
            only. The tokens are read three times.
        sharding: how they are split: "contiguous", or "zigzag": rank r of n holds the chunks r and 2n - 1 - r of each
            row's 2n, all of one length, the one behind the other (Megatron-LM, slime). Striped shards are not served.

    Returns:
        float32 in the shape of rewards; a row without a valid token is 0. A row's bits depend on what is
        between its first and its last valid token alone. Rewards are constants.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, name or number; an argument that needs a gradient; on the CPU
            also for values that are not finite where valid. These the kernel finds, so that `out` has been written to.
    """
    check.choice("op", op, RETURNS_OPS)
    check.choice("masked_rewards", masked_rewards, MASKED_REWARDS)
    forward, summed = not check.flag("reverse", reverse), op == "sum"
    call = _Call("discounted_returns", "rewards", rewards, mask, cu_seqlens, at_masked, process_group, sharding)
    scale = _soft_scale(op, temperature, call.x)
    if not summed and process_group is not None:
        raise ValueError(f"process_group: only sums go over ranks, got op={op!r}")
    move = summed and call.moves(masked_rewards)
    call.add("beyond", "initial", initial, per_row=True)
    call.coefficient("gamma", gamma)
    if move and forward and process_group is None:
        call.x, move = _moved(call), False
    kind = op if summed or scale is None else "logsumexp"
    options = ReturnsOptions("returns", call.at_masked, kind, not forward, move)
    return call.run(options, {"scale": 1.0 if scale is None else scale}, out=out)[0]


@accepts_arrays
@refused_together
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: Number = 1.0,
    lam: Number = 1.0,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    done: Tensor | None = None,
    at_masked: AtMasked = "carry",
    masked_rewards: MaskedRewards = "to-last-valid",
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    process_group: ProcessGroup | None = None,
    sharding: Sharding = "contiguous",
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438): advantages, and returns = advantages + values.

    A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, over the valid tokens.

    Args:
        rewards, values: [B, T], or packed [N] with cu_seqlens; any real dtype, computed with in float32. Finite where
            valid.
        mask: the shape of rewards, nonzero = the policy's own token. Other tokens get 0 in both results, and what lies
            there does not matter, NaN included; only rewards may still count (masked_rewards).
        gamma, lam: discounts; numbers, 0-d tensors, [B] (length-adaptive lambda: VAPO, arXiv 2504.05118), or the shape
            of rewards.
        next_values: values of the states after each token, in the shape of rewards; or [B], of those after the last
            valid tokens: the bootstrap of truncated rows. Default: the next token's value, and 0 after the last.
        terminated: the shape of rewards, nonzero = the episode ends with this token: nothing follows, whatever
            next_values says.
        done: the same, but the episode is cut off here: no advantage comes from the right, the next value still does
            (a terminated one is always done).
        at_masked: what happens at a masked token between valid ones:
            "carry": it is skipped; the next value and advantage are those of the next valid token (verl, TRL, NeMo-RL).
            "zero": it takes time; it is a token with reward 0 and value 0.
            "decay": as "zero", and it keeps its advantage and return (OpenRLHF).
            "reset": each run of valid tokens is a row of its own.
            Under "zero" and "decay" a gamma or lam per token is read at masked tokens too.
        masked_rewards: as in `discounted_returns`: "to-last-valid" or "drop" (verl, OpenRLHF).
        whiten: the advantages as `whiten` gives them (verl, TRL); returns are those of the advantages as they were.
        cu_seqlens: integers [B + 1], the packed sequences' bounds, from 0 to N. Where N == B see `policy_loss`.
        out: (advantages, returns), where the results go; float32, contiguous, memory of their own.
        process_group, sharding: rows that go on at other ranks, as in `discounted_returns`; whiten is then
            over all of them.

    Returns:
        (advantages, returns), float32 in the shape of rewards. A row's bits depend on what is between its first and
        its last valid token alone (whitening depends on all). All arguments are constants.

    Raises:
        TypeError, ValueError: as `discounted_returns`, and with whiten=True as `whiten`.
    """
    check.choice("masked_rewards", masked_rewards, MASKED_REWARDS)
    whitened = check.flag("whiten", whiten)
    call = _Call("gae", "rewards", rewards, mask, cu_seqlens, at_masked, process_group, sharding)
    call.add("values", "values", values)
    call.transitions(gamma, lam, next_values, terminated, done)
    move = call.moves(masked_rewards)
    options = ReturnsOptions("gae", call.at_masked, move=move)
    return call.run_pair(options, {}, out, ("advantages", "returns"), whiten=whitened)


@accepts_arrays
@refused_together
def lambda_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    next_values: Tensor,
    gamma: Number = 1.0,
    lam: Number = 1.0,
    terminated: Tensor | None = None,
    done: Tensor | None = None,
    at_masked: AtMasked = "carry",
    masked_rewards: MaskedRewards = "to-last-valid",
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    sharding: Sharding = "contiguous",
) -> Tensor:
    """TD(lambda) targets: G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1}), and r_t + gamma V_{t+1} at the end.

    Args:
        rewards, next_values: [B, T], or packed [N] with cu_seqlens; next_values are those of the states after each
            token. Finite where valid.
        mask, gamma, lam, terminated, done, at_masked, masked_rewards, cu_seqlens: as in `gae`.
        out: where the result goes; float32, contiguous, memory of its own.
        process_group, sharding: rows that go on at other ranks, as in `discounted_returns`.

    Returns:
        float32 in the shape of rewards; with next_values = V_{t+1} it is the return of `gae`, except that a masked
        token which takes time has next value 0 here. All arguments are constants.

    Raises:
        TypeError, ValueError: as `discounted_returns`.
    """
    check.choice("masked_rewards", masked_rewards, MASKED_REWARDS)
    call = _Call("lambda_returns", "rewards", rewards, mask, cu_seqlens, at_masked, process_group, sharding)
    call.add("next_values", "next_values", next_values)
    call.transitions(gamma, lam, None, terminated, done)
    move = call.moves(masked_rewards)
    return call.run(ReturnsOptions("lambda", call.at_masked, move=move), {}, out=out)[0]


@accepts_arrays
@refused_together
def vtrace(
    log_ratios: Tensor,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: Number = 1.0,
    lam: Number = 1.0,
    rho_bar: Number = 1.0,
    c_bar: Number = 1.0,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    done: Tensor | None = None,
    at_masked: AtMasked = "carry",
    masked_rewards: MaskedRewards = "to-last-valid",
    cu_seqlens: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    process_group: ProcessGroup | None = None,
    sharding: Sharding = "contiguous",
) -> tuple[Tensor, Tensor]:
    """V-trace (arXiv 1802.01561): off-policy targets of the value function, and advantages.

    v_t = V_t + d_t + gamma c_t (v_{t+1} - V_{t+1}), d_t = rho_t (r_t + gamma V_{t+1} - V_t), where
    rho_t = min(rho_bar, ratio) and c_t = lam min(c_bar, ratio); the advantage is rho_t (r_t + gamma v_{t+1} - V_t).

    Args:
        log_ratios: log-prob of the target policy less that of the one that acted, per token; the shape of rewards.
        rewards, values, mask, gamma, lam, next_values, terminated, done, at_masked, masked_rewards, cu_seqlens: as in
            `gae`. A masked token that takes time has ratio 1.
        rho_bar, c_bar: bounds of the ratio, in the fixed point and in the trace; positive numbers or 0-d tensors.
        out: (targets, advantages), where the results go; float32, contiguous, memory of their own.
        process_group, sharding: rows that go on at other ranks, as in `discounted_returns`.

    Returns:
        (targets, advantages), float32 in the shape of rewards. All arguments are constants.

    Raises:
        TypeError, ValueError: as `discounted_returns`.
    """
    check.choice("masked_rewards", masked_rewards, MASKED_REWARDS)
    call = _Call("vtrace", "rewards", rewards, mask, cu_seqlens, at_masked, process_group, sharding)
    call.add("log_ratios", "log_ratios", log_ratios)
    call.add("values", "values", values)
    call.transitions(gamma, lam, next_values, terminated, done)
    move = call.moves(masked_rewards)
    bars = {name: number(name, x, call.x, check.positive) for name, x in (("rho_bar", rho_bar), ("c_bar", c_bar))}
    return call.run_pair(ReturnsOptions("vtrace", call.at_masked, move=move), bars, out, ("targets", "advantages"))


# ----------------------------------------------------------------------------------------------------------- arguments
class _Call:
    """The arguments of one call, checked one by one; then it runs."""

    def __init__(
        self,
        function: str,
        name: str,
        x: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        at_masked: AtMasked,
        process_group: ProcessGroup | None,
        sharding: Sharding,
    ) -> None:
        check.choice("at_masked", at_masked, AT_MASKED)
        check.choice("sharding", sharding, SHARDINGS)
        self.group, self.sharding = process_group, sharding
        self.function, self.at_masked = function, at_masked
        self.x = check.constant(name, check.reals(name, x)).contiguous()
        if cu_seqlens is None and self.x.ndim != 2:
            raise ValueError(f"{name}: expected [B, T], or [N] with cu_seqlens, got shape {list(self.x.shape)}")
        self.bounds = token_bounds(cu_seqlens, self.x, name)
        self.mask = check.mask(mask, name, self.x)
        self.rows = self.x.shape[0] if self.bounds is None else self.bounds.shape[0] - 1
        self.inputs: dict[str, Tensor | None] = {}
        self.numbers: dict[str, Number] = {"gamma": 1.0, "lam": 1.0, "scale": 1.0, "rho_bar": 1.0, "c_bar": 1.0}

    def moves(self, masked_rewards: MaskedRewards) -> bool:
        """Whether there may be rewards to be moved from masked tokens; some may be on another rank."""
        return masked_rewards == "to-last-valid" and (self.mask is not None or self.group is not None)

    def add(self, field: str, name: str, x: Tensor | None, *, per_row: bool = False) -> None:
        """An optional tensor per token, or [B]."""
        if x is None:
            return
        x = check.constant(name, check.reals(name, x)).contiguous()
        check.same_device(name, x, "rewards", self.x)
        if per_row:
            check.shape(name, x, (self.rows,), "one per sequence")
            if check.values_checked(x):
                check.every(name, x.isfinite(), x, "finite numbers")
        else:
            check.shape(name, x, self.x.shape, "as rewards")
        self.inputs[field] = x

    def coefficient(self, name: str, x: Number) -> None:
        """A number, [B], or one per token."""
        if not isinstance(x, Tensor) or x.ndim == 0:
            self.numbers[name] = number(name, x, self.x, check.finite)
            return
        x = check.constant(name, check.reals(name, x)).contiguous()
        check.same_device(name, x, "rewards", self.x)
        if not check.shape_among(x, self.x.shape, (self.rows,)):
            raise ValueError(
                f"{name}: expected a number, [{self.rows}] (one per sequence) or {list(self.x.shape)} (as rewards), "
                f"got shape {list(x.shape)}"
            )
        per_token = one_per_token(name, x, self.x.shape, self.bounds)
        if check.values_checked(x):
            only_counted = per_token and self.at_masked not in ("decay", "zero")
            check.counted_finite(name, x, self.mask if only_counted else None)
        self.inputs[name] = x

    def transitions(
        self,
        gamma: Number,
        lam: Number,
        next_values: Tensor | None,
        terminated: Tensor | None,
        done: Tensor | None,
    ) -> None:
        """What gae, lambda_returns and vtrace have in common."""
        self.coefficient("gamma", gamma)
        self.coefficient("lam", lam)
        if next_values is not None:
            given = check.tensor("next_values", next_values)
            per_row = not one_per_token("next_values", given, self.x.shape, self.bounds, spread=False)
            self.add("beyond" if per_row else "next_values", "next_values", next_values, per_row=per_row)
        for name, x in (("terminated", terminated), ("done", done)):
            flags = check.mask(x, "rewards", self.x, name)
            self.inputs[name] = None if flags is None else flags != 0 if flags.dtype != torch.bool else flags

    def run_pair(
        self,
        options: ReturnsOptions,
        numbers: dict[str, Number],
        out: tuple[Tensor, Tensor] | None,
        names: tuple[str, str],
        *,
        whiten: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Two results."""
        if out is not None and (not isinstance(out, tuple | list) or len(out) != 2):
            raise TypeError(f"out: expected a pair ({', '.join(names)}), got {type(out).__name__}")
        first, second = (None, None) if out is None else out
        return self.run(options, numbers, out=first, second=second, pair=out is not None, whiten=whiten)

    def run(
        self,
        options: ReturnsOptions,
        numbers: dict[str, Number],
        *,
        out: Tensor | None,
        second: Tensor | None = None,
        pair: bool = False,
        whiten: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Both results; the second is empty where there is one only."""
        given = {"out[0]": out, "out[1]": second} if pair else {} if out is None else {"out": out}
        outputs = self._outputs(given)
        backend = select("returns", self.x)
        inputs = ReturnsInputs(**{"rewards": self.x, **self.inputs})  # type: ignore[arg-type]
        if (backend != "cpu" or self.group is not None) and check.values_checked(self.x):  # whose kernel sees to it
            inputs.check_finite(self.mask)
        if self.group is not None:
            return self._across(inputs, options, numbers, outputs, backend, self.group, whiten=whiten)
        if whiten and check.values_checked(self.x):
            check_counted(self.x.numel() if self.mask is None else count_valid(self.mask), 1)
        values = list((self.numbers | numbers).values())
        arguments = (*inputs, self.mask, self.bounds, *split_all(values), options.text(), whiten)
        if not outputs:
            fresh: tuple[Tensor, Tensor] = ops.returns(*arguments, backend)
            return fresh
        results = (outputs[0], outputs[1] if pair else None)
        ops.returns_(*arguments, *results, backend)
        return results  # type: ignore[return-value]

    def _across(
        self,
        inputs: ReturnsInputs,
        options: ReturnsOptions,
        numbers: dict[str, Number],
        outputs: list[Tensor],
        backend: str,
        group: ProcessGroup,
        *,
        whiten: bool,
    ) -> tuple[Tensor, Tensor]:
        """Both results where the rows go on at other ranks."""
        known = joined_all(*split_all(list((self.numbers | numbers).values())), backend)
        shard = Shard(inputs, self.mask, self.bounds, known, options, self.sharding, backend, whiten)
        first, second = sharded_scan(shard, Ranks.of(group))
        found = [first, first.new_empty(0) if second is None else second]
        for k, out in enumerate(outputs):
            found[k] = out.copy_(found[k])
            torch.autograd.graph.increment_version(out)
        if whiten:
            whiten_all(found[0], self.mask, process_group=group, out=found[0])
        return found[0], found[1]

    def _outputs(self, given: dict[str, Any]) -> list[Tensor]:
        """The tensors that the results go to: memory of their own."""
        outputs = [check.output(self.function, name, x, self.x, "rewards") for name, x in given.items()]
        for name, x in zip(given, outputs, strict=True):
            others = [y for key, y in zip(given, outputs, strict=True) if key != name]
            check.own_memory(name, x, (self.x, self.mask, self.bounds, *self.inputs.values(), *others))
        return outputs


def _soft_scale(op: str, temperature: Number | None, like: Tensor) -> Number | None:
    """The factor of the logarithm: positive for a soft maximum, negative for a soft minimum; None: no logarithm."""
    if op == "sum" and temperature is not None:
        raise ValueError('temperature: expected None for op="sum"')
    if temperature is None:
        return 1.0 if op == "logsumexp" else None
    scale = number("temperature", temperature, like, check.positive)
    return -scale if op == "min" else scale


def _moved(call: _Call) -> Tensor:
    """Rewards with those of masked tokens at the valid token before them: what they come to from the right, gamma 0."""
    inputs, options = ReturnsInputs(call.x), ReturnsOptions(move=True)
    numbers = [0.0, 1.0, 1.0, 1.0, 1.0]
    moved: Tensor
    moved, _ = ops.returns(
        *inputs, call.mask, call.bounds, numbers, None, options.text(), False, select("returns", call.x)
    )
    return moved
