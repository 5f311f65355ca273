"""Verdicts, and the page that they are printed on."""

from benchmarks.__main__ import render
from benchmarks.common import Verdict, environment


def test_verdicts():
    assert Verdict("x", 1.19, at_most=1.2).holds and not Verdict("x", 1.21, at_most=1.2).holds
    assert Verdict("x", 1.3, at_least=1.3).holds and not Verdict("x", 1.29, at_least=1.3).holds
    assert not Verdict("x", float("nan"), at_most=1.2).holds and not Verdict("x", float("nan"), at_least=1.3).holds
    assert str(Verdict("x", 2.0, at_most=1.2)) == "FAILS: x: 2, at most 1.2"


def test_page():
    result = {
        "name": "n",
        **environment(),
        "tables": [{"title": "t", "columns": ["a", "b"], "rows": [["1", "2"]]}],
        "verdicts": [{"bar": "x", "ratio": 2.0, "at_most": 1.0, "at_least": None, "holds": False}],
        "missing": {"peer": "why"},
    }
    page = render([result])
    assert "| a | b |\n| --- | ---: |\n| 1 | 2 |" in page
    assert "- **fails**: x: 2, at most 1" in page and "- missing: peer: `why`" in page
