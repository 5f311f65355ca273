"""What one rank process of `tests.ranks.RankPool` runs: a loop that takes a function, calls it and answers."""

import faulthandler
import importlib
import importlib.util
import os
import pickle
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=15)
# A failed rank keeps its process group this long, so that what it had already sent still reaches its peers; then it
# closes the group, which ends the collectives its peers wait in.
FAILED_RANK_HOLD = 2.0


class Job(NamedTuple):
    """One call in one rank. The arguments are pickled apart: they may need the test module loaded first."""

    path: str | None
    module: str
    qualname: str
    payload: bytes
    rank: int
    world_size: int
    store: str
    give_up: float  # seconds after which the process ends itself, should the parent be gone


class Failure(NamedTuple):
    """An exception in a rank: the name of its type, its message, and its traceback as text."""

    type: str
    message: str
    trace: str


class Value(NamedTuple):
    """A pickled return value."""

    data: bytes


def worker(conn: Connection, stacks: str) -> None:
    """Answers jobs until the parent closes the pipe; SIGUSR1 writes all thread stacks to the file `stacks`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends the pool
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo otherwise has to resolve the host's name
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            conn.send(os.getpid())
            while True:
                job = Job(*conn.recv())
                faulthandler.dump_traceback_later(job.give_up, exit=True, file=file)
                _serve(conn, job)
                faulthandler.cancel_dump_traceback_later()
        except (EOFError, OSError):
            return


def _serve(conn: Connection, job: Job) -> None:
    """Runs one job: answer, keep the process group until every rank has answered, close it, acknowledge."""
    environ = dict(os.environ)
    places = {"RANK": job.rank, "WORLD_SIZE": job.world_size}
    os.environ.update({prefix + name: str(value) for name, value in places.items() for prefix in ("", "LOCAL_")})
    answer = _guarded(_call, job)
    conn.send(tuple(answer))
    conn.poll(FAILED_RANK_HOLD if isinstance(answer, Failure) else None)
    closed = _guarded(_close_group)
    os.environ.clear()
    os.environ.update(environ)
    conn.recv()  # the parent's word that every rank has answered
    conn.send(tuple(closed))


def _guarded(fn: Callable[..., Any], *args: Any) -> Value | Failure:
    try:
        return Value(pickle.dumps(fn(*args)))
    except BaseException as error:  # SystemExit and the like must not end the loop
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # the first one is this function
        trace = "".join(traceback.format_exception(type(error), error, frames))
        return Failure(type(error).__qualname__, str(error), trace)


def _call(job: Job) -> Any:
    fn = attrgetter(job.qualname)(_load(job.path, job.module))
    args, kwargs = pickle.loads(job.payload)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)  # a test gives the same result whatever ran in this process before it
    random.seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{job.store}", rank=job.rank, world_size=job.world_size, timeout=GROUP_TIMEOUT
    )
    return fn(*args, **kwargs)


def _close_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _load(path: str | None, name: str) -> ModuleType:
    """The module `name` read from the file `path`; loaded once per process."""
    if path is None:
        return importlib.import_module(name)
    module = sys.modules.get(name)
    if module is not None and getattr(module, "__file__", None) == path:
        return module
    if "." in name:
        importlib.import_module(name.rpartition(".")[0])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
