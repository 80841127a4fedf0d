"""The ranks of a process group: what a call sends to the others, and how one that refuses its arguments tells them."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.transforms import transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

P = ParamSpec("P")
R = TypeVar("R")

#: Integers that a rank says of itself when a call begins, behind two others: whether it takes part, and in what call.
_SAID: Final = 4


class Ranks:
    """A process group in one call. All that crosses is gathered and put together in rank order: equal bits everywhere.

    device: where the call's tensors are.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        if transformed():
            raise NotImplementedError(
                "fastreward: process_group is not available under torch.func or with dual tensors"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group: expected a torch.distributed.ProcessGroup that this process is a member of "
                f"(of a DeviceMesh: mesh.get_group(dim)), got {type(group).__name__}"
            )
        self.group, self.device = group, device
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._met = False

    @staticmethod
    def of(group: ProcessGroup) -> Ranks:
        """The ranks that `refused_together` has made of a call's `process_group`."""
        return cast(Ranks, group)

    def meet(self, *numbers: int | Tensor, same: Mapping[str, object]) -> Tensor:
        """i64 [ranks, len(numbers)]: what each rank says of itself; the first collective of a call.

        same: what has to be alike on every rank, by the names of arguments, as the ranks would else wait for each other
        in different collectives. Raises ValueError where it is not, or where another rank has refused its arguments, if
        the host may look.
        """
        call = {name: _described(x) for name, x in same.items()}
        said = [1, _digest(call), *numbers, *[0] * (_SAID - len(numbers))]
        self._met = True
        all_said = self.gather(_integers(said, self.device))
        if check.values_checked(all_said):
            self._check_taking_part(all_said[:, 0])
            if not bool((all_said[:, 1] == all_said[0, 1]).all()):
                self._refuse_different(call)
        return all_said[:, 2 : 2 + len(numbers)]

    def refuse(self) -> None:
        """Tells the others, who wait in `meet`, that this rank does not take part; nothing once they have met."""
        if not self._met:
            self._met = True
            self.gather(_integers([0] * (_SAID + 2), self.device))

    def finish(self, ok: bool) -> None:
        """Tells the others how what each computes for itself has ended; raises where it has not on another rank.

        Nothing on a GPU, where looking would wait for it.
        """
        told = _integers([int(ok)], self.device)
        if check.values_checked(told):
            all_told = self.gather(told)[:, 0]
            if ok:
                self._check_taking_part(all_told)

    def _check_taking_part(self, flags: Tensor) -> None:
        if not bool(flags.all()):
            refusing = ", ".join(str(r) for r, ok in enumerate(flags.tolist()) if not ok)
            raise ValueError(f"process_group: rank {refusing} of it has refused its arguments; its own error says why")

    def _refuse_different(self, call: dict[str, str]) -> None:
        calls: list[dict[str, str]] = [{}] * self.count
        dist.all_gather_object(calls, call, group=self.group)
        name = next(n for n in dict.fromkeys(n for c in calls for n in c) if len({c.get(n) for c in calls}) > 1)
        got = ", ".join(f"{c.get(name, 'none')} on rank {r}" for r, c in enumerate(calls))
        raise ValueError(f"{name}: expected the same on every rank of process_group, got {got}")

    def gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: x of every rank, of one shape and dtype everywhere."""
        if self.count == 1 or not x.numel():
            return x.unsqueeze(0).expand(self.count, *x.shape)
        out = x.new_empty((self.count, *x.shape))
        dist.all_gather(list(out.unbind()), x.contiguous(), group=self.group)
        return out

    def add_(self, x: Tensor) -> None:
        """The sum over the ranks in place of x; large tensors, whose bits are those of the backend's reduction."""
        if self.count > 1 and x.numel():
            dist.all_reduce(x, group=self.group)

    def before(self, numbers: Tensor) -> Tensor:
        """The sum of [ranks, ...] over the ranks before this one; where it begins, if numbers are widths."""
        return numbers[: self.rank].sum(0)


def refused_together(function: Callable[P, R]) -> Callable[P, R]:
    """Lets no rank of `process_group=` wait for one that has refused its arguments before anything crossed.

    It says so in the collective in which the others begin, and they raise too. On a GPU, where looking would wait for
    the device, only with FASTREWARD_DEBUG=1.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        group: Any = kwargs.get("process_group")
        if group is None or isinstance(group, Ranks):
            return function(*args, **kwargs)
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        ranks = Ranks(group, next((x.device for x in tensors), torch.device("cpu")))
        kwargs["process_group"] = ranks
        try:
            return function(*args, **kwargs)
        except Exception:
            ranks.refuse()
            raise

    return wrapper


@contextmanager
def own_part(group: ProcessGroup | None) -> Iterator[None]:
    """For what each rank of a call computes for itself after its last collective: where one raises, all do."""
    if group is None:
        yield
        return
    try:
        yield
    except Exception:
        Ranks.of(group).finish(False)
        raise
    Ranks.of(group).finish(True)


def _integers(numbers: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """i64 [n]; what is on the device stays there, and nothing is copied to a GPU, which would be waited for."""
    if device.type == "cpu" and all(isinstance(x, int) for x in numbers):
        return torch.tensor(numbers, dtype=torch.int64)
    made = (x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int64, device=device) for x in numbers)
    return torch.stack([x.long() for x in made])


def _described(x: object) -> str:
    """A value in a few letters, which differ where values do (of tensors on a GPU where shapes or dtypes do)."""
    if not isinstance(x, Tensor):
        return f"{x}"
    kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    return f"{kind} of checksum {checksum(x):x}" if check.values_checked(x) else kind


def _digest(call: Mapping[str, str]) -> int:
    """Equal for equal calls; of others hardly ever."""
    digest = hashlib.blake2b(repr(call).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def checksum(x: Tensor) -> int:
    """Equal for equal tensors of one shape and dtype; of others hardly ever."""
    return zlib.crc32(x.detach().reshape(-1).cpu().view(torch.uint8).numpy().tobytes())
