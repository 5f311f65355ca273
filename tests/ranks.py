"""Runs test functions in several ranks at once, in worker processes that are kept between tests.

    def add() -> float:
        x = torch.ones(1)
        dist.all_reduce(x)
        return x.item()

    def test_add(ranks):
        assert ranks.run(3, add) == [3.0, 3.0, 3.0]

Each rank has a gloo process group, one thread, and the environment variables that torchrun sets. What goes wrong in
any rank (an exception, a hang, a death) arrives as one RankError.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from tests.rank_worker import Failure, Job, Value, worker

ROOT = Path(__file__).resolve().parents[1]
MAX_RANKS = 8
# Once a rank has failed the others get this long: their collectives end by the group timeout at the latest.
GRACE = 15.0
START_TIMEOUT = 120.0
CLOSE_TIMEOUT = 10.0
# Imported once, in the process that the ranks are forked from; none of these runs an op or starts a thread.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"]


class RankError(AssertionError):
    """Some ranks failed. `errors` holds what happened, by rank."""

    def __init__(self, what: str, world_size: int, errors: dict[int, Failure]) -> None:
        self.errors = dict(sorted(errors.items()))
        parts = [f"{what}: {len(errors)} of {world_size} ranks failed"]
        parts += [f"---- rank {rank}: {error.type} ----\n{error.trace}" for rank, error in self.errors.items()]
        super().__init__("\n\n".join(part.rstrip() for part in parts))


class _Rank:
    """One worker process, seen from the parent."""

    def __init__(self, context: Any, stacks: Path) -> None:
        self.stacks = stacks
        self.conn, child = context.Pipe()
        self.process = context.Process(target=worker, args=(child, str(stacks)), daemon=True)
        self.process.start()
        child.close()

    def receive(self) -> Value | Failure | None:
        """The next answer; None when the process has died instead of giving one."""
        try:
            answer = self.conn.recv()
        except (EOFError, OSError):
            return None
        return Value(*answer) if len(answer) == 1 else Failure(*answer)

    def death(self) -> Failure:
        self.process.join(5)
        code = self.process.exitcode
        how = f"with exit code {code}"
        if code is not None and code < 0:
            how = f"by signal {signal.Signals(-code).name} (exit code {code})"
        return Failure("RankDied", f"the process died {how}", f"the process died {how} without answering")

    def stop(self, kill: bool) -> None:
        self.conn.close()  # an idle worker ends at this
        self.process.join(0 if kill else 5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class RankPool:
    """Worker processes, one per rank; started when first needed, and anew after a rank died or hung."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._runs = 0

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60, **kwargs: Any) -> list[Any]:
        """Calls the module-level `fn(*args, **kwargs)` in ranks 0..world_size-1; returns the values by rank."""
        answers = self._answers(world_size, fn, args, kwargs, timeout)
        failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
        if failures:
            raise RankError(_name(fn), world_size, failures)
        return [pickle.loads(answers[rank].data) for rank in range(world_size)]

    def errors(
        self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60, **kwargs: Any
    ) -> list[str]:
        """Like run, for a function that has to raise in every rank: returns the exceptions' messages by rank."""
        answers = self._answers(world_size, fn, args, kwargs, timeout)
        failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
        if any(failure.type in ("RankDied", "RankHung") for failure in failures.values()):
            raise RankError(_name(fn), world_size, failures)
        silent = [rank for rank in range(world_size) if rank not in failures]
        if silent:
            report = str(RankError(_name(fn), world_size, failures))
            raise AssertionError(f"every rank of {_name(fn)} should raise, but ranks {silent} returned\n{report}")
        return [failures[rank].message for rank in range(world_size)]

    def close(self) -> None:
        """Ends all worker processes and the server they were forked from."""
        self._stop(kill=False)
        self._folder.cleanup()
        if not multiprocessing.active_children():  # else somebody else still needs the server
            multiprocessing.forkserver._forkserver._stop()

    def _answers(
        self, world_size: int, fn: Callable[..., Any], args: tuple, kwargs: dict, timeout: float
    ) -> dict[int, Value | Failure]:
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size is {world_size}, a RankPool runs 1 to {MAX_RANKS} ranks")
        path, module, qualname = _locate(fn)
        payload = pickle.dumps((args, kwargs))
        try:
            self._start(world_size)
            self._runs += 1
            store = os.path.join(self._folder.name, f"store-{self._runs}")
            give_up = timeout + GRACE + CLOSE_TIMEOUT + 5
            for rank in range(world_size):
                job = Job(path, module, qualname, payload, rank, world_size, store, give_up)
                self._send(rank, tuple(job))
            answers = self._collect(world_size, timeout, _name(fn))
            if len(self._ranks) >= world_size:  # nobody died or hung
                self._close_groups(world_size, answers, _name(fn))
            return answers
        except BaseException:  # KeyboardInterrupt: the ranks are in an unknown state
            self._stop(kill=True)
            raise

    def _close_groups(self, world_size: int, answers: dict[int, Value | Failure], what: str) -> None:
        for rank in range(world_size):
            self._send(rank, None)
        closed = self._collect(world_size, CLOSE_TIMEOUT, f"destroy_process_group after {what}")
        for rank, answer in closed.items():
            if isinstance(answer, Failure) and isinstance(answers[rank], Value):
                answers[rank] = answer

    def _send(self, rank: int, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died; _collect says so
            self._ranks[rank].conn.send(message)

    def _start(self, world_size: int) -> None:
        """Brings the pool to at least `world_size` processes that are ready."""
        if any(not rank.process.is_alive() for rank in self._ranks):
            self._stop(kill=True)  # one died while idle
        new = world_size - len(self._ranks)
        if new <= 0:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # the server and all ranks inherit it
        try:
            for _ in range(new):
                stacks = Path(self._folder.name, f"stacks-{self._runs}-{len(self._ranks)}")
                self._ranks.append(_Rank(context, stacks))
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        for rank in self._ranks[-new:]:
            if not rank.conn.poll(START_TIMEOUT):
                raise RuntimeError(f"a rank process did not start within {START_TIMEOUT:.0f} s")
            rank.conn.recv()

    def _collect(self, world_size: int, timeout: float, what: str) -> dict[int, Value | Failure]:
        """One answer per rank. Ends the pool when a rank died or did not answer in time."""
        answers: dict[int, Value | Failure] = {}
        pending = set(range(world_size))
        begin = time.monotonic()
        deadline = begin + timeout
        died = False
        while pending and (left := deadline - time.monotonic()) > 0:
            # A dying process closes its end of the pipe, so that the pipe reports both answers and deaths.
            ready = connection.wait([self._ranks[rank].conn for rank in pending], left)
            for rank in [rank for rank in pending if self._ranks[rank].conn in ready]:
                answer = self._ranks[rank].receive()
                died = died or answer is None
                answers[rank] = answer or self._ranks[rank].death()
                pending.remove(rank)
                if isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + GRACE)
        if pending:
            stacks = self._dump_stacks(world_size)
            waited = f"no answer within {time.monotonic() - begin:.0f} s"
            for rank in pending:
                answers[rank] = Failure("RankHung", waited, f"{waited}, still in {what}:\n{stacks[rank]}")
            for rank in set(range(world_size)) - pending:
                if isinstance(answers[rank], Value):
                    trace = f"returned from {what}, waits for ranks {sorted(pending)}:\n{stacks[rank]}"
                    answers[rank] = Failure("RankWaits", f"waits for ranks {sorted(pending)}", trace)
        if pending or died:
            self._stop(kill=True)
        return answers

    def _dump_stacks(self, world_size: int) -> list[str]:
        """Makes every rank write its thread stacks, and reads them."""
        ranks = self._ranks[:world_size]
        for rank in ranks:
            if rank.process.is_alive():
                os.kill(rank.process.pid, signal.SIGUSR1)
        sizes, previous = [0] * len(ranks), [-1] * len(ranks)
        for _ in range(20):  # 2 s at most: until every file has something in it and none grows any more
            if min(sizes) > 0 and sizes == previous:
                break
            time.sleep(0.1)
            previous, sizes = sizes, [rank.stacks.stat().st_size for rank in ranks]
        return [rank.stacks.read_text() or "(the process is gone or stopped)" for rank in ranks]

    def _stop(self, kill: bool) -> None:
        while self._ranks:
            self._ranks.pop().stop(kill)


def _name(fn: Callable[..., Any]) -> str:
    return f"{fn.__module__}.{fn.__qualname__}"


def _locate(fn: Callable[..., Any]) -> tuple[str | None, str, str]:
    """File, dotted module name and qualified name of `fn`. A test module is named by its place under the root, not
    by what pytest happened to call it."""
    module = sys.modules.get(fn.__module__)
    try:
        found = attrgetter(fn.__qualname__)(module)
    except AttributeError:
        found = None
    if found is not fn:
        _reject(fn)
    path = getattr(module, "__file__", None)
    tests = ROOT / "tests"
    if path is not None and Path(path).resolve().is_relative_to(tests):
        return path, ".".join(Path(path).resolve().relative_to(ROOT).with_suffix("").parts), fn.__qualname__
    if fn.__module__ == "__main__":
        return path, "__rank_main__", fn.__qualname__
    return None, fn.__module__, fn.__qualname__


def _reject(fn: Callable[..., Any]) -> NoReturn:
    raise TypeError(f"ranks run module-level functions only, and {_name(fn)} cannot be found under that name")
