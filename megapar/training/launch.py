"""Starts the ranks of a command on this machine, through torchrun's own launcher, and says in a sentence how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

REFUSED = 2
"""Exit status of a rank that refused its input and has said why."""
INTERRUPTED = 130


def ranks_wanted(asked: str, needed: int, device: str) -> int:
    """How many ranks `--nproc` means: `auto` is as many as the layout needs, tp x dp x pp. Raises ValueError where they cannot run."""
    if asked != "auto" and not (asked.isdecimal() and int(asked) > 0):
        raise ValueError(f"--nproc {asked} must be a number of ranks, 1 or more, or auto: correct it")
    count = needed if asked == "auto" else int(asked)
    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise ValueError("parallel.device is cuda and torch sees no GPU: use --parallel.device cpu, or see megapar doctor")
    if device != "cpu" and 0 < gpus < count:
        raise ValueError(f"{count} ranks need a GPU each and torch sees {gpus}: lower --tp, --pp and --nproc, or use --parallel.device cpu")
    return count


def launch(arguments: Sequence[str], ranks: int, max_restarts: int = 0) -> int:
    """Runs `python -m megapar *arguments` in `ranks` processes under torchrun's environment; the exit status.

    max_restarts: how often all of them are started again when one died or failed; not when the run was interrupted, or has refused what
    it would refuse again.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    # The agent's own account of a failure is a page long; ours is below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for start in range(max_restarts + 1):
        status = _run(arguments, ranks)
        if status in (0, REFUSED, INTERRUPTED) or start == max_restarts:
            break
        print(f"megapar: starting all ranks again, for the {start + 1}. of at most {max_restarts} times", file=sys.stderr)
    return status


def _run(arguments: Sequence[str], ranks: int) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megapar", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (REFUSED, INTERRUPTED):
            return int(failure.exitcode)
        how = f"was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
        print(f"megapar: rank {rank} {how}: its own output above says more, if it could", file=sys.stderr)
        return 1
    except SignalException:
        return INTERRUPTED
    return 0
