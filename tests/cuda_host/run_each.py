"""Chosen tests on several libraries, each in a fork of one process that has imported what they need, which takes longer than they do.

Takes a JSON list of [library, file of tests, expression for -k]; prints a JSON list of exit codes, below 0 for a signal.
"""

import json
import os
import sys

import hypothesis  # noqa: F401
import pytest

from tests.cuda_host import host


def run(library: str, file: str, chosen: str) -> int:
    child = os.fork()
    if child == 0:
        os.environ[host.VARIABLE] = library
        silent = os.open(library + ".log", os.O_WRONLY | os.O_CREAT)
        os.dup2(silent, 1), os.dup2(silent, 2)
        os._exit(pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", chosen, file]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


print(json.dumps([run(*each) for each in json.loads(sys.argv[1])]))
