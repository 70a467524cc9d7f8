"""Collectives of a `torch.distributed` group, with clear errors if a process is lost.

Sums are computed in float64 on every backend. If another process has died or raised an exception, a
collective raises a `RuntimeError` that names the collective, the ranks that do not answer and the remedy:
immediately if the backend notices (gloo), otherwise within the timeout of the group (nccl).
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import bad_value

#: Seconds between two looks at what other processes have posted, and how long a roll call takes at most.
_LOOK, _ROLL_CALL = 0.2, 5.0
_counter = itertools.count()
Sums = TypeVar("Sums")


class SingleProcess:
    """Single-process stand-in: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, part: Tensor, what: str) -> Tensor:
        """The sum of `part` over all processes."""
        return part

    def sums(self, what: str, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        mine = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return list(self.all_reduce(mine, what).tolist())

    def total(self, part: Sums, what: str) -> Sums:
        """Sum a dataclass over all processes: tensors and numbers are added, other fields are kept."""
        found: dict[str, Any] = {}
        for field in fields(part):  # type: ignore[arg-type]
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                found[field.name] = self.all_reduce(value, f"{what}: {field.name}")
            elif isinstance(value, int | float):
                found[field.name] = type(value)(self.sums(f"{what}: {field.name}", value)[0])
        return replace(part, **found)  # type: ignore[type-var]

    def broadcast(self, value: Tensor, what: str) -> Tensor:
        """The `value` of rank 0."""
        return value

    def all_gather(self, part: Tensor, what: str, dim: int = 0) -> Tensor:
        """The parts of all processes, one after the other; they may differ in length along `dim`."""
        return part


SINGLE_PROCESS = SingleProcess()


class StoppedError(RuntimeError):
    """A collective did not end, because another process of the group has died or stopped."""


class Ranks(SingleProcess):
    """The processes of a group, each with a share of the training set.

    Args:
        group: A process group; None is the default one.

    Raises:
        ValueError: No group has been initialized, or this process is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not in_group():
            raise bad_value(
                "process_group",
                "be initialized",
                "none",
                "Start with torchrun and call torch.distributed.init_process_group().",
            )
        if dist.get_rank(group) < 0:
            raise bad_value("process_group", "hold this process", "a group that it is not in")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._backends = dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
        # torch has no public accessor of the store. Processes create their objects in the same order.
        store = dist.distributed_c10d._get_default_store()
        name = getattr(group or dist.group.WORLD, "group_name", "")
        self._store: Any = dist.distributed_c10d.PrefixStore(f"stride_captum/{name}/{next(_counter)}", store)
        self._call, self._open = 0, False
        self._stopped: str | None = None

    def shard(self, n: int) -> slice:
        """Consecutive rows of this process; sizes differ by at most one."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def all_reduce(self, part: Tensor, what: str) -> Tensor:
        """The sum of `part` over all processes, added in float64."""
        whole = part.detach().to(self._place(part)).to(torch.float64, copy=True).contiguous()
        self._finish(what, lambda: dist.all_reduce(whole, group=self.group, async_op=True))
        return whole.to(part.device, part.dtype)

    def broadcast(self, value: Tensor, what: str) -> Tensor:
        """The `value` of rank 0; those of the others give its shape."""
        sent = value.detach().to(self._place(value), copy=True).contiguous()
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        self._finish(what, lambda: dist.broadcast(sent, first, group=self.group, async_op=True))
        return sent.to(value.device)

    def all_gather(self, part: Tensor, what: str, dim: int = 0) -> Tensor:
        """The parts of all processes, one after the other; they may differ in length along `dim`."""
        rows = part.detach().transpose(0, dim)
        sizes = torch.cat(self._gather(torch.tensor([len(rows)], device=part.device), what)).tolist()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        whole = [p[:n] for p, n in zip(self._gather(padded, what), sizes, strict=True)]
        return torch.cat(whole).transpose(0, dim).to(part.device)

    def agree(self, value: str, name: str, must: str) -> None:
        """Raise on every process if `value` differs between processes.

        Raises:
            ValueError: "`name` must <must>", with the ranks that differ from rank 0.
        """
        digest = torch.frombuffer(bytearray(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8)
        digests = self._gather(digest, f"comparison of `{name}`")
        other = [rank for rank, found in enumerate(digests) if not torch.equal(found, digests[0])]
        if other:
            raise bad_value(name, must, f"something else than rank 0 on {_named(other)}")

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """Context manager around a call that all processes make: an exception in one ends it in all."""
        if self._open:  # nested call
            yield
            return
        if self._stopped is not None:  # collectives of other processes may still be running
            raise StoppedError(self._stopped)
        self._call, self._open = self._call + 1, True
        try:
            yield
        except StoppedError as error:
            self._stopped = str(error)
            raise
        except Exception as error:
            with suppress(RuntimeError):
                self._store.set(
                    f"{self._call}/error", f"{self.rank} stopped in {what}: {type(error).__name__}: {error}"
                )
            raise
        finally:
            self._open = False

    def _place(self, tensor: Tensor) -> torch.device:
        """Device on which the backend handles the tensor: its own with nccl, else the CPU."""
        if self._backends.get(tensor.device.type, "gloo") != "gloo":
            return tensor.device
        return torch.device("cpu" if "cpu" in self._backends else next(iter(self._backends)))

    def _gather(self, part: Tensor, what: str) -> list[Tensor]:
        sent = part.to(self._place(part)).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        self._finish(what, lambda: dist.all_gather(parts, sent, group=self.group, async_op=True))
        return parts

    def _finish(self, what: str, start: Callable[[], Any]) -> None:
        """Start a collective, and wait until it ends or another process reports an error."""
        deadline = time.monotonic() + 0.9 * self._timeout()  # before the backend aborts the process
        next_look, pause = time.monotonic() + _LOOK, 2e-5
        try:
            work = start()
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.01)
                if time.monotonic() > next_look:
                    self._listen()
                    if time.monotonic() > deadline:
                        raise RuntimeError("it took longer than the timeout of the process group")
                    next_look = time.monotonic() + _LOOK
            work.wait()
        except StoppedError:
            raise
        except RuntimeError as error:
            raise self._lost(what, str(error).split("\n")[0]) from error

    def _timeout(self) -> float:
        group, device = self.group or dist.group.WORLD, torch.device(next(iter(self._backends)))
        options = getattr(group._get_backend(device), "options", None)  # type: ignore[union-attr]
        timeout = getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)
        return float(timeout.total_seconds())

    def _listen(self) -> None:
        """Raise if another process has reported an error."""
        for key, news in (("error", "has stopped"), ("lost", "has lost a connection")):
            if self._store.check([f"{self._call}/{key}"]):
                raise RuntimeError(f"another process {news}")

    def _lost(self, what: str, cause: str) -> StoppedError:
        """Error with the exception that another process has posted, or the ranks that miss a roll call."""
        missing, heard = set(range(self.size)), False
        failed = f"The collective {what!r} failed on rank {self.rank} of {self.size}"
        until = time.monotonic() + min(_ROLL_CALL, 0.05 * self._timeout())
        with suppress(RuntimeError):  # the store is gone with the process that hosts it
            if self._store.check([f"{self._call}/error"]):
                said = self._store.get(f"{self._call}/error").decode()
                return StoppedError(f"{failed}: rank {said}. Mend that, and start all processes again.")
            self._store.set(f"{self._call}/lost", "")
            self._store.set(f"{self._call}/here/{self.rank}", "")
            while missing and time.monotonic() < until:
                missing = {r for r in missing if not self._store.check([f"{self._call}/here/{r}"])}
                heard = True
                time.sleep(0.05)
        if not heard:
            who = "The store of the group does not answer: its keeper, in general rank 0, is gone."
        elif missing:
            who = f"No answer from {_named(sorted(missing))}: dead, or still busy elsewhere."
        else:
            who = "All ranks answer."
        return StoppedError(
            f"{failed}: {cause}. {who} Look for the first error in the logs of these ranks (out of memory?), "
            "and start all processes again with the same command; `torchrun --max-restarts` does so by "
            "itself. Raise the `timeout` of init_process_group() if a rank was only slow."
        )


def in_group() -> bool:
    """Whether a default process group has been initialized."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process prints and writes: rank 0, or the only one."""
    return not in_group() or dist.get_rank() == 0


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def group_of_torchrun() -> Iterator[None]:
    """Join the gloo group of torchrun, if torchrun has started this process."""
    if not started_by_torchrun():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Context manager: the block runs on rank 0 first, so that the others find its files."""
    if not in_group():
        yield
        return
    ranks = Ranks()
    with ranks.call("what rank 0 does first"):
        if ranks.rank:
            ranks.broadcast(torch.zeros(1, device="cpu"), "wait for rank 0")
        yield
        if not ranks.rank:
            ranks.broadcast(torch.zeros(1, device="cpu"), "wait for rank 0")


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
