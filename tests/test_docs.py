"""Commands in the documentation are commands that run would take."""

import re
import shlex
from pathlib import Path

import pytest

from megapar.training.config_file import load_config
from megapar.training.layout import check_layout
from megapar.training.sections import ranks_of

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[str]:
    """Every `megapar train` of the shipped configs in README, docs and the help, of which lines that end in a backslash go on."""
    texts = [(ROOT / "README.md").read_text(), *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    texts.append((ROOT / "megapar" / "cli.py").read_text())
    joined = "\n".join(texts).replace("\\\n", " ")
    return sorted({found[1].strip() for found in re.finditer(r"megapar train (configs/\S+\.toml[^\n`]*)", joined)})


def test_there_are_some():
    assert len(commands()) >= 3


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documentation_is_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    path, *words = shlex.split(command)
    for option in ("--nproc", "--max-restarts"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    config = load_config(Path(path), words)
    check_layout(config, ranks_of(config))
