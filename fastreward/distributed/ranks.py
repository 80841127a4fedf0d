"""The ranks of a process group: what a call sends to the others, and how one that refuses its arguments tells them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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

#: Integers that a rank says of itself when a call begins; the first of all tells whether it takes part.
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

    def meet(self, *numbers: int | Tensor) -> Tensor:
        """i64 [ranks, len(numbers)]: what each rank says of itself; the first collective of a call.

        Raises ValueError where another rank has refused its arguments, if the host may look.
        """
        said = [1, *numbers, *[0] * (_SAID - len(numbers))]
        self._met = True
        all_said = self.gather(_integers(said, self.device))
        if check.values_checked(all_said) and not bool(all_said[:, 0].all()):
            refusing = ", ".join(str(r) for r, ok in enumerate(all_said[:, 0].tolist()) if not ok)
            raise ValueError(f"process_group: rank {refusing} of it has refused its arguments; its own error says why")
        return all_said[:, 1 : 1 + len(numbers)]

    def refuse(self) -> None:
        """Tells the others, who wait in `meet`, that this rank does not take part; nothing once they have met."""
        if not self._met:
            self._met = True
            self.gather(_integers([0] * (_SAID + 1), self.device))

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


def _integers(numbers: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """i64 [n]; what is on the device stays there, and nothing is copied to a GPU, which would be waited for."""
    if device.type == "cpu" and all(isinstance(x, int) for x in numbers):
        return torch.tensor(numbers, dtype=torch.int64)
    made = (x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int64, device=device) for x in numbers)
    return torch.stack([x.long() for x in made])
