"""What a finished run leaves behind: the model, a report, a sample of text, a summary against n-gram baselines, and the pipeline's
timeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megapar.data.baselines import bigram_loss, unigram_loss
from megapar.mesh import ParallelMesh
from megapar.models.generate import generate
from megapar.pipeline.simulate import measured_costs, simulate
from megapar.pipeline.timeline import draw, write_trace
from megapar.training.checkpoint import save_checkpoint
from megapar.training.config import Config
from megapar.training.config_file import to_dict
from megapar.training.examples import Examples
from megapar.training.loop import Trained
from megapar.training.report_html import write_report
from megapar.training.sections import steps_of

Baselines = dict[str, float]


def report(trained: Trained, config: Config, mesh: ParallelMesh) -> str:
    """Writes the run's results to its folder and returns the summary that the user reads. Called on every rank."""
    out, run = trained.out, config.run
    if trained.interrupted:
        unsaved = "its checkpoint could not be written" if run.save_every else "no checkpoint was asked for (--save-every)"
        saved = "its checkpoint is saved, --resume yes goes on from it" if trained.saved else unsaved
        return f"stopped at step {trained.step} of {steps_of(config)}; metrics are in {out / 'metrics.jsonl'}; {saved}"
    model = _save_model(trained, config, mesh)
    text = trained.examples.text
    prompt = torch.tensor([text.tokenizer.encode(run.prompt) or [text.tokenizer.end_of_text]], device=mesh.device)
    options = {"window": config.data.sequence_length, "seed": run.seed, "text_size": text.tokenizer.vocab_size}
    tokens = generate(trained.model, prompt, run.sample_tokens, top_p=0.9, **options)
    sample = text.tokenizer.decode(tokens[0].tolist())
    if mesh.world.rank != 0:
        return ""
    baselines = _baselines(trained.examples)
    (out / "sample.txt").write_text(sample, encoding="utf-8")
    losses = {"held_out_loss": trained.held_out_loss} | ({} if trained.test_loss is None else {"test_loss": trained.test_loss})
    summary = {**losses, **baselines, "steps": trained.step, "memory": trained.memory}
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    page, *_ = write_report(out / "metrics.jsonl", out / "report.html")
    lines = [
        "",
        f"held-out loss {trained.held_out_loss:.4f} nats a token over a text of {len(text.held_out) - 1:,} tokens",
        *([] if trained.test_loss is None else [f"test loss {trained.test_loss:.4f} over {len(text.test) - 1:,}"]),
        *(f"   {name:<10} {value:.4f}" for name, value in baselines.items()),
        "memory of rank 0, MB: " + ", ".join(f"{kind.replace('_', ' ')} {size / 1e6:.0f}" for kind, size in trained.memory.items()),
        "",
        "sample:",
        *("   " + line for line in sample.splitlines()),
        "",
        f"model {model}",
        f"report {page}, metrics {out / 'metrics.jsonl'}, sample {out / 'sample.txt'}, config {out / 'config.json'}",
        *_timeline_lines(trained),
    ]
    return "\n".join(lines)


def _save_model(trained: Trained, config: Config, mesh: ParallelMesh) -> Path:
    """Weights, config and tokenizer in a folder of their own; a run that is repeated into the same folder gets the next free name."""
    base = trained.out / "model"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"model-{number}")
    assert trained.model.optimizer is not None
    weights = (box for box in trained.model.optimizer.boxes() if box.kind == "weight")
    save_checkpoint(folder, weights, {"step": trained.step, "config": to_dict(config)}, mesh)
    if mesh.world.rank == 0:
        trained.examples.text.tokenizer.save(folder / "tokenizer.json")
    return folder


def _baselines(examples: Examples) -> Baselines:
    """Losses of counting models: of the held-out text, or, for objectives that predict something else, of their own targets."""
    if examples.kind in ("denoising", "ul2"):
        return {"unigram of the targets": examples.unigram_loss()}
    text, size = examples.text, examples.text.tokenizer.vocab_size
    return {"unigram": unigram_loss(text.train, text.held_out, size), "bigram": bigram_loss(text.train, text.held_out, size)}


def _timeline_lines(trained: Trained) -> list[str]:
    """Draws and writes what the pipeline's ranks did in the last step, and says where; nothing without a pipeline or a step."""
    timeline, schedule, out = trained.timeline, trained.model.runner.schedule, trained.out
    if timeline is None or not any(timeline.ranks):
        return []
    simulated = simulate(schedule, measured_costs(timeline, schedule.stages))
    draw({"measured, seconds": timeline, "simulated with the measured costs": simulated}, out / "timeline.png")
    write_trace(timeline, out / "timeline.json")
    return [
        f"pipeline {out / 'timeline.png'}, {out / 'timeline.json'} (Perfetto): last step {1e3 * timeline.makespan:.0f} ms, "
        f"simulated {1e3 * simulated.makespan:.0f} ms; bubble {timeline.bubble:.0%}, simulated {simulated.bubble:.0%}"
    ]
