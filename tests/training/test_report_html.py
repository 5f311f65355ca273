"""The report: one page that holds its pictures, made of whatever a run has left."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.image import imread

from megapar.training.history import history_of
from megapar.training.report_html import write_report
from megapar.training.report_plots import draw_plots
from tests.training.test_history import rollback


def full(number: int) -> dict[str, object]:
    measured = {"grad_norm": 1.0, "tokens_per_second": 1000.0, "seconds": 0.5, "peak_bytes": 3_000_000, "loss_scale": 2.0**16}
    return {
        "step": number,
        "loss": 5.0 - 0.1 * number,
        "lr": 1e-3,
        "tokens": 64,
        "batch_size": 8,
        "samples": 8 * number,
        "skipped": 0,
    } | measured


RUN = [
    *map(full, range(1, 6)),
    {"step": 5, "held_out_loss": 4.75, "held_out": {"causal_lm": 4.75}},
    {"step": 5, "checkpoint": {"step": 4, "stall": 0.125, "seconds": 2.0, "bytes": 5_000_000, "error": None}},
    {**full(6), "skipped": 1, "reason": "loss scale"},
    rollback(6, 4),
    {"step": 4, "resumed": {"from": 4, "changed": {"run.steps": [6, 7]}}},
    *map(full, range(5, 7)),
    full(7) | {"objectives": {"causal_lm": 1.75}},
    {"step": 7, "held_out_loss": 4.5, "held_out": {"causal_lm": 4.5, "fim <mid>": 4.25}},
    {"step": 7, "test_loss": 4.125, "test": {"causal_lm": 4.0625}},
    {"step": 7, "checkpoint": {"step": 7, "stall": 0.5, "seconds": 1.0, "bytes": 0, "error": "no space <left>"}},
    {"step": 7, "recovery": {"action": "stop", "reason": "<script>alert(1)</script>"}},
]
NAMES = {"loss", "loss-tokens", "objectives", "lr", "batch-size", "grad-norm", "loss-scale", "tokens-per-second", "peak-bytes"}


def written(folder: Path, records: list[dict[str, object]], **files: object) -> tuple[str, set[str]]:
    """The page, and the names of the pictures beside it, which are those in it."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    page, *pictures = write_report(folder / "metrics.jsonl", folder / "new" / "report.html")
    text = page.read_text(encoding="utf-8")
    inside = dict(re.findall(r'<img id="([^"]+)"[^>]* src="data:image/png;base64,([^"]+)"', text))
    assert {f"report-{name}.png": base64.b64decode(data) for name, data in inside.items()} == {p.name: p.read_bytes() for p in pictures}
    assert all(imread(BytesIO(path.read_bytes())).ndim == 3 for path in pictures)
    return text, set(inside)


class Page(HTMLParser):
    """Text outside of styles, tags that are not closed, and whatever would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.fetched, self.tags = "", list[str](), list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open += [] if tag in ("meta", "img") else [tag]
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def test_everything_is_in_it(tmp_path):
    config = {"model": {"layers": 2, "name": "<b>&"}, "run": {"steps": 7}}
    text, names = written(tmp_path, RUN, config=config, summary={"held_out_loss": 4.5, "bigram": 3.75, "steps": 7, "memory": {}})
    page = Page(text)
    assert names == NAMES | {"checkpoint-stalls"}
    assert not page.open and not page.fetched and "script" not in page.tags and "b" not in page.tags
    for told in (
        *("model.name", "<b>&", "run.steps", "<script>alert(1)</script>", "no space <left>", "loss scale", "spike", "[16, 24]"),
        *(
            "baseline bigram",
            "3.7500",
            "4.5000 at step 7",
            "4.1250 at step 7",
            "fim <mid>",
            "4.0625",
            "1.7500",
            "tokens",
            "448",
            "2, training stood still for 0.62 s",
            '{"run.steps": [6, 7]}',
            "rollback",
        ),
    ):
        assert told in page.text, told
    rows = page.text.split()
    assert rows[rows.index("undone") + 1] == "2", "steps 5 and 6 of the first line"


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path, count):
    text, names = written(tmp_path, RUN[:count])
    assert ("No step was recorded" in text) == (count == 0)
    assert names == (NAMES - {"objectives"} if count else set())


def test_no_metrics(tmp_path):
    assert [path.name for path in write_report(tmp_path / "metrics.jsonl", tmp_path / "report.html")] == ["report.html"]


def test_numbers_that_are_none(tmp_path):
    """A run that diverged is reported too, and one of which only an evaluation, or only losses, are left."""
    bad = [{"step": i, "loss": loss, "grad_norm": float("inf"), "lr": 0.0} for i, loss in enumerate((5.0, float("inf"), float("nan")), 1)]
    assert written(tmp_path, [*bad, {"step": 3, "held_out_loss": float("nan")}])[1] == {"loss", "lr", "grad-norm"}
    assert written(tmp_path, [{"step": 3, "held_out_loss": 2.0}])[1] == {"loss"}


def test_an_unreadable_config(tmp_path):
    for content, words in (("{", "config.json cannot be read"), ("[]", "config.json holds a list and must hold an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            write_report(tmp_path / "metrics.jsonl", tmp_path / "report.html")


def test_pictures_show_what_was_undone():
    """A run with a rollback is drawn otherwise than the line that counts of it alone; the same history is drawn alike."""
    clean = [{key: full(step)[key] for key in ("step", "loss", "tokens", "lr")} for step in range(1, 8)]
    rolled = [*clean[:6], rollback(6, 4), *clean[4:]]
    one, other, again = (draw_plots(history_of(records), {}) for records in (clean, rolled, rolled))
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one) and other == again
