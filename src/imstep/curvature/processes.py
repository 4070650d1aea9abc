"""Processes that hold the same parameters and add up what each finds on its own part of a batch.

Every process makes the same calls in the same order; what they decide by is what was added up, which is the same for
all. What may go wrong in one process alone, its part of an evaluation, therefore runs inside of a call here, which ends
with the same exception everywhere.
"""

from __future__ import annotations

import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from imstep.complexstep.rules.collectives import exchanges
from imstep.curvature.domain import OutsideTheDomainError, outside_the_domain
from imstep.curvature.unmoved import sums_of_words

_T = TypeVar("_T")

# Other names from PyTorch 2.13 on, where those before warn at every call.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

DIGITS = 8
"""How many numbers below 64 tell whether processes are at the same place: a difference goes unseen once in 2⁴⁸."""

HEADER = 1 + 2 * DIGITS
"""Entries of a sum that are of the call itself: how many processes failed; the numbers, and their squares."""


class OtherProcessError(RuntimeError):
    """Another process could not do its part of an evaluation, so that all have left what they were doing."""


class _OutsideElsewhereError(OtherProcessError, OutsideTheDomainError):
    """It could not, since numbers were outside of its closure's domain."""


class ProcessesLostError(RuntimeError):
    """The processes cannot reach each other any more, or are not at the same place."""


class Processes:
    """A group of processes.

    Args:
        group: of ``torch.distributed``; this process is in it.

    Attributes:
        rank: number of this process in the group.
        size: how many there are.
        alike: whether each evaluates one closure, which count the same, so that closures may exchange tensors.
        serving: a context for the part of each, which all processes enter and leave together.

    Raises:
        TypeError: no process group.
        ValueError: this process is not in it.
    """

    def __init__(self, group: Any) -> None:
        outside = group is dist.GroupMember.NON_GROUP_MEMBER  # what new_group() gives to processes that it leaves out
        if not isinstance(group, dist.ProcessGroup) and not outside:
            raise TypeError(
                f"process_group must be a process group of torch.distributed, got {type(group).__name__}. Call "
                "torch.distributed.init_process_group() first, and pass torch.distributed.group.WORLD."
            )
        self.rank = -1 if outside else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(
                "this process is not in the process_group that it was given. Build the optimizer or the operator in "
                "the processes of the group only."
            )
        self.size = dist.get_world_size(group)
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._lost: str | None = None
        self._interrupted = False
        self._calls = 0
        self.alike = False
        self.serving: Callable[[], AbstractContextManager[None]] = nullcontext
        self._seen = exchanges()

    @classmethod
    def of(cls, group: Any) -> Processes | None:
        """Those of a group; None for no group, and for one of a single process."""
        if group is None:
            return None
        processes = cls(group)
        return processes if processes.size > 1 else None

    def __deepcopy__(self, memo: Any) -> Processes:
        """Itself: copies are of the same processes."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refused: a group lives as long as its processes do."""
        raise TypeError(
            "an optimizer or an operator with a process_group cannot be pickled, since the group ends with its "
            "processes. Save optimizer.state_dict() instead."
        )

    def __repr__(self) -> str:
        return f"{self.size} processes"

    def includes(self, ranks: Sequence[int]) -> bool:
        """Whether processes of these ranks are among them."""
        return set(ranks) <= set(self._ranks)

    def same_as(self, group: Any) -> bool:
        """Whether a group is of the same processes."""
        return self.are(dist.get_process_group_ranks(group))

    def are(self, ranks: Sequence[int]) -> bool:
        """Whether they are those of these numbers in the world, in this order."""
        return list(ranks) == self._ranks

    # --- collectives --------------------------------------------------------------------------------------------

    def sum(
        self, part: Callable[[], Tensor | None], size: int, like: Any, direction: Tensor | None = None
    ) -> Tensor:
        """The sum of what each process finds, (size,), bit for bit the same for all; one all-reduce.

        Args:
            part: what this process adds, (size,); None for zeros. It may fail: all raise then.
            like: gives dtype and device.
            direction: what all must have the same of, bit for bit.

        Raises:
            OtherProcessError: ``part`` failed in another process; in this one it raises what it raised.
            ProcessesLostError: the processes are not at the same place, or one has ended.
        """
        buffer = torch.zeros(1, HEADER + size, dtype=like.dtype, device=like.device)
        error = self._fill(buffer, part, direction)
        self._carry_out(lambda: dist.all_reduce(buffer, group=self._group))
        self._look(buffer[0, :HEADER], error)
        return buffer[0, HEADER:]

    def _fill(
        self, buffer: Tensor, part: Callable[[], Tensor | None], direction: Tensor | None
    ) -> BaseException | None:
        """Write what this process finds behind its header; the error if it failed."""
        found, error = self._found(part)
        if error is not None:
            buffer[:, 0] = 1
        elif found is not None:
            buffer[:, HEADER:] = found
        self._calls += 1
        within, self._seen = exchanges() - self._seen, exchanges()
        digits = _digits(self._calls + within * 2**20, direction).to(buffer)
        buffer[:, 1 : 1 + DIGITS], buffer[:, 1 + DIGITS : HEADER] = digits, digits * digits
        return error

    def _found(self, part: Callable[[], _T]) -> tuple[_T | None, BaseException | None]:
        """What this process finds, or the error that it met; others are served until all are done."""
        found, error = None, None
        with self.serving():
            try:
                found = part()
                self._heed()
            except BaseException as caught:  # an interrupt as well
                error = caught
        return found, error

    def _look(self, header: Tensor, error: BaseException | None) -> None:
        """Raise where the sum of headers tells that processes are apart, or that one has failed."""
        failed, *signs = header.tolist()
        # Equal numbers, and no others, have the squares of their sum and of themselves in this proportion.
        pairs = zip(signs[:DIGITS], signs[DIGITS:], strict=True)
        if any(total * total != self.size * squares for total, squares in pairs):
            self._lose(
                "the processes are not at the same place: what they multiply or evaluate next differs. They must build "
                "the same model, take the same steps with the same options, multiply the same vectors and hold the "
                "same state; a random vector must come from a generator of the same seed. On CPUs they must compute "
                "with the same number of threads (torch.set_num_threads), on processors of one kind: else they round "
                "differently."
            )
        if failed:
            self._leave(error)

    def rows(self, own: Tensor) -> Tensor:
        """A vector (width,) of each process, (processes, width); one all-gather."""
        self._calls += 1
        every = own.new_empty(self.size, len(own))
        self._carry_out(lambda: _all_gather(every.view(-1), own.contiguous(), group=self._group))
        return every

    def scattered(self, rows: Tensor) -> Tensor:
        """The row with this process's number of the sum of rows (processes, width); one reduce-scatter."""
        self._calls += 1
        row = torch.empty_like(rows[0])
        self._carry_out(lambda: _reduce_scatter(row, rows.view(-1), group=self._group))
        return row

    def exchanged(self, sent: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """What each process has sent to this one, of the given lengths, for a vector to each; one all-to-all."""
        self._calls += 1
        got, given = sent[0].new_empty(sum(lengths)), torch.cat(list(sent))
        sizes = [len(t) for t in sent]
        self._carry_out(lambda: dist.all_to_all_single(got, given, list(lengths), sizes, group=self._group))
        return list(got.split(list(lengths)))

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of numbers of which none can fail to be there."""
        self._calls += 1
        total = numbers.clone()
        self._carry_out(lambda: dist.all_reduce(total, group=self._group))
        return total

    def gather(self, own: Callable[[], _T]) -> list[_T]:
        """What each process finds, a small object that can be pickled, in order of their numbers.

        Raises: as :meth:`sum`.
        """
        found, error = self._found(own)
        every = self._exchanged((_account(error), found))
        self._raise([account for account, _ in every], error)
        return [value for _, value in every]

    def _leave(self, error: BaseException | None) -> None:
        """Raise in all processes, one or several of which have failed."""
        self._raise(self._exchanged(_account(error)), error)

    def _exchanged(self, own: Any) -> list[Any]:
        every = [None] * self.size
        self._carry_out(lambda: dist.all_gather_object(every, own, group=self._group))
        return every

    def _raise(self, accounts: Sequence[tuple[str, bool] | None], error: BaseException | None) -> None:
        """Raise if a process has failed: here its own error, elsewhere what tells of the first."""
        failed = {rank: account for rank, account in enumerate(accounts) if account is not None}
        if not failed:
            return
        # All must take it for the same: a trial outside the domain is no failure where nothing else failed.
        outside = all(is_outside for _, is_outside in failed.values())
        telling = {rank: text for rank, (text, is_outside) in failed.items() if is_outside == outside}
        if error is not None and self.rank in telling:
            raise error
        rank, text = next(iter(telling.items()))
        kind = _OutsideElsewhereError if outside else OtherProcessError
        raise kind(
            f"process {rank} of {self.size} failed in its part of an evaluation, which all have left together: {text}"
        ) from None

    def _carry_out(self, collective: Callable[[], Any]) -> None:
        if self._lost is not None:
            raise ProcessesLostError(self._lost)
        try:
            collective()
        except RuntimeError as error:
            self._lose(
                f"process {self.rank} of {self.size} could not exchange numbers with the others: one has ended, or has "
                "not come to this point within the timeout of the process group. What it was doing is undone here. "
                "Look for the first error of all processes; then start them again, from a saved state.",
                error,
            )
        except BaseException:
            self._lost = "an exchange between processes was broken off before. Start them again."
            raise

    def _lose(self, message: str, cause: BaseException | None = None) -> NoReturn:
        self._lost = message
        raise ProcessesLostError(message) from cause

    # --- agreement ----------------------------------------------------------------------------------------------

    def own_number(self, number: int) -> int:
        """A number for this process from one that is the same for all; no other process gets it, from any."""
        return number * self.size + self.rank

    def own_generator(self, shared: torch.Generator) -> torch.Generator:
        """A generator for this process's part, from one that is the same for all and stays so."""
        seed = int(torch.randint(2**62, (1,), generator=shared, device=shared.device))
        return torch.Generator(device=shared.device).manual_seed(seed + self.rank)

    @contextmanager
    def interrupted_together(self) -> Iterator[None]:
        """A context in which Ctrl-C waits for this process's next part of an evaluation; a second one does not wait.

        An interrupt between two evaluations would leave the others waiting. Handlers of others stay as they are.
        """
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._heed()

    def _heed(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt


def digest(tensors: Sequence[Tensor]) -> int:
    """A number that tells tensors apart by their bits."""
    return 0 if not tensors else zlib.crc32(sums_of_words(tensors).cpu().numpy().tobytes())


def check_forms(forms: Sequence[tuple[int, int]]) -> None:
    """Raise where a process trains other numbers of tensors and of entries than the first."""
    for rank, own in enumerate(forms):
        if own != forms[0]:
            raise ValueError(
                f"process {rank} trains {own[0]} tensors with {own[1]:,} entries, process 0 {forms[0][0]} with "
                f"{forms[0][1]:,}. Build the same model in every process, and freeze the same parameters: one that a "
                "process does not use counts there with a gradient of zero."
            )


def check_parameters(digests: Sequence[int], kind: str = "") -> None:
    """Raise where the parameters of a process, by their :func:`digest`, are not those of the first."""
    for rank, own in enumerate(digests):
        if own != digests[0]:
            raise ValueError(
                f"the {kind}parameters of process {rank} differ from those of process 0, where all are to hold the "
                "same. Build the model from the same seed in every process, or send one's to all first: for p in "
                "model.parameters(): torch.distributed.broadcast(p.data, 0). If they were the same before, something "
                "moved them since, or the processes run on machines that round differently."
            )


def _account(error: BaseException | None) -> tuple[str, bool] | None:
    """What other processes are told of an error: a text, and whether it is one of the domain."""
    if error is None:
        return None
    return f"{type(error).__name__}: {error}", outside_the_domain(error)


def _digits(call: int, direction: Tensor | None) -> Tensor:
    """DIGITS numbers below 64 from the bits of a tensor and the number of a call."""
    mixed = torch.tensor(call * 0x9E3779B97F4A7C1 % 2**62)
    if direction is not None:
        sums = sums_of_words([direction])
        odd = torch.arange(1, 2 * len(sums), 2, device=sums.device)
        mixed = mixed.to(sums.device) + (sums * odd).sum()
    return (mixed >> torch.arange(0, 6 * DIGITS, 6, device=mixed.device)) & 63
