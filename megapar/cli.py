"""The command line: megapar train | verify | prepare | plan | checkpoint | report | doctor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megapar.data.prepare_command import prepare_command
from megapar.doctor import doctor
from megapar.failures import RemoteError, named_failures
from megapar.mesh import ParallelMesh
from megapar.pipeline.kinds import KINDS, make_schedule
from megapar.pipeline.schedule import Schedule
from megapar.pipeline.zero_bubble import split_backward
from megapar.planning.schedule import parse_costs, plan_schedule
from megapar.training.checkpoint.commands import checkpoint_command
from megapar.training.config_file import load_config
from megapar.training.examples import Examples
from megapar.training.launch import INTERRUPTED, launch, ranks_wanted
from megapar.training.layout import check_layout, make_mesh
from megapar.training.loop import train
from megapar.training.report import report
from megapar.training.report_html import write_report
from megapar.training.sections import ranks_of, with_dp
from megapar.training.text import load_text
from megapar.training.verify import verify
from megapar.training.verify_decoder import verify_decoder
from megapar.training.verify_subject import load_subject
from megapar.training.verify_table import print_cases

HELP = """\
megapar: Megatron-style model-parallel layers and training in PyTorch.

  megapar train [CONFIG.toml] [--nproc N|auto] [--max-restarts N] [--section.key value ...]
      Pretrains a decoder on text. Starts N ranks itself (auto: tp x dp x pp of them), or runs as a rank under
      torchrun. Every key of the config can be overridden; megapar train --help lists them.

        megapar train configs/demo.toml --nproc auto
        megapar train configs/demo.toml --nproc auto --corpus my_text/ --out runs/mine --save-every 100
        megapar train configs/demo.toml --nproc auto --out runs/mine --save-every 100 --resume auto --max-restarts 3
        torchrun --nproc-per-node 4 -m megapar train configs/demo.toml --dp 1 --pp 4 --chunks 1

  megapar verify [module:build] [--tp N] [--sequence-parallel] [--dp N --zero STAGE --precision KIND]
                 [--pp N --chunks N --microbatches N --schedule KIND]
      Builds your model once alone and once in parallel from one seed, runs a step, and compares outputs, loss
      and every raw gradient with the promised bounds. Without a model it proves megapar's own decoder.

        megapar verify my_model:build --tp 2
        megapar verify --pp 2 --chunks 2 --microbatches 5 --schedule zero_bubble
        megapar verify --dp 2 --pp 2 --zero 3 --precision bf16

  megapar plan schedule [FILE.csv] --pp N [--chunks N] --microbatches N [--zero-bubble] [--out FILE.svg]
      A pipeline schedule, made or read from a file: proven, simulated, as a table and as a picture.

        megapar plan schedule --pp 4 --chunks 2 --microbatches 8 --zero-bubble --costs 1,1.1,0.9,0.05

  megapar prepare INPUT... --out NAME [--tokenizer FILE|bpe|bytes|characters] [--workers N]
      Tokenizes text, .jsonl, Parquet and saved datasets of any size into Megatron's NAME.bin and NAME.idx, which a
      run reads without loading them: --corpus NAME, or a blend --corpus "0.7:NAME 0.3:OTHER".

  megapar checkpoint inspect|verify|convert FOLDER
      What a checkpoint holds; whether every byte of it is there; its weights for other tools.

  megapar report RUN_FOLDER
      The report of a run that has not ended, from its metrics: RUN_FOLDER/report.html, one page, and its pictures.

  megapar doctor
      Versions, devices, instruction sets, which kernels are active and how to get what is missing.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0 done, 1 failed, 2 refused, 130 interrupted."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "verify": _verify,
        "prepare": prepare_command,
        "plan": _plan,
        "checkpoint": checkpoint_command,
        "report": _report,
        "doctor": _doctor,
    }
    if command in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if command not in commands:
        print(f'megapar: "{command}" is not a command: use one of {", ".join(commands)}, or --help', file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except (ValueError, OSError) as error:
        return _refuse(error, 2)
    except RemoteError as error:
        return _refuse(error, 1)
    except KeyboardInterrupt:
        return 130


def _refuse(error: Exception, status: int) -> int:
    """Says the sentence, with the rank that says it."""
    rank = os.environ.get("RANK")
    # One write: two ranks share the terminal, and print() writes the end of the line apart.
    sys.stderr.write(f"megapar: {error}\n" if rank is None else f"megapar: rank {rank}: {error}\n")
    return status


def _under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _train(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", default="1")
    parser.add_argument("--max-restarts", type=int, default=0)
    known, rest = parser.parse_known_args(arguments)
    path = Path(rest[0]) if rest and not rest[0].startswith("-") else None
    config = load_config(path, rest[1:] if path else rest)
    if not _under_torchrun():
        ranks = ranks_wanted(known.nproc, ranks_of(config), config.parallel.device)
        config = with_dp(config, ranks)
        check_layout(config, ranks)
        if known.max_restarts < 0:
            raise ValueError(f"--max-restarts {known.max_restarts} must be 0 or more: 0 starts nothing again")
        if known.max_restarts and (config.run.resume != "auto" or not config.run.save_every):
            needed = "--resume auto and --save-every, or each start would begin anew"
            raise ValueError(f"--max-restarts {known.max_restarts} needs {needed}: give both")
        if ranks > 1 or known.max_restarts:
            # What is wrong with the text is said once, before any rank starts; what is right they find in the cache.
            text = load_text(config.data)
            text.tokenizer.encode(config.run.prompt)
            Examples(text, config).check(config)
            return launch(["train", *rest], ranks, known.max_restarts)
    mesh = make_mesh(config)
    trained = train(config, mesh)
    with named_failures(mesh):
        summary = report(trained, config, mesh)
    if mesh.world.rank == 0:
        print(summary, flush=True)
    mesh.close()
    return INTERRUPTED if trained.interrupted else 0


def _verify(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="megapar verify", description="Proves that a model in parallel is the model alone.")
    parser.add_argument("target", nargs="?", help="module:build, a function that returns your model; none: megapar's own decoder")
    parser.add_argument("--tp", type=int, help="ranks that share each layer (default: 2, in a pipeline 1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline ranks (default: 1)")
    parser.add_argument("--chunks", type=int, default=1, help="stages a pipeline rank (default: 1)")
    parser.add_argument("--microbatches", type=int, help="micro-batches of the pipeline's step (default: pp + 1)")
    parser.add_argument("--schedule", choices=KINDS, help="default: 1f1b, interleaved with several chunks")
    parser.add_argument("--dp", type=int, default=1, help="replicas that share a step's micro-batches (default: 1)")
    parser.add_argument("--zero", type=int, choices=range(4), help="stage of ZeRO over dp (default: 1 if dp is above 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of parameters (default: fp32)")
    parser.add_argument("--sequence-parallel", action="store_true", help="pass sequence_parallel=True to build")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compare (default: cpu, where fp64 is at home)")
    asked = parser.parse_args(arguments)
    pp, dp, sharded = asked.pp, asked.dp, asked.zero is not None or asked.precision != "fp32"
    tp = asked.tp if asked.tp is not None else 2 if pp == dp == 1 and not sharded else 1
    if min(tp, dp, pp) < 1 or (tp * dp * pp < 2 and not sharded):
        raise ValueError(f"--tp {tp} --dp {dp} --pp {pp} leaves nothing to compare: give 2 or more of one, 1 or more of the others")
    if pp == 1 and (asked.chunks != 1 or asked.microbatches is not None or asked.schedule):
        raise ValueError("--chunks, --microbatches and --schedule are for pipelines: give --pp 2 or more, or leave them out")
    microbatches = pp + 1 if asked.microbatches is None else asked.microbatches
    schedule = None if pp == 1 else make_schedule(asked.schedule, pp, asked.chunks, microbatches)
    if not _under_torchrun():
        return launch(["verify", *arguments], ranks_wanted("auto", tp * dp * pp, asked.device))
    subject = load_subject(asked.target, asked.sequence_parallel) if asked.target else None
    mesh = ParallelMesh(tp=tp, pp=pp, device=asked.device if asked.device == "cpu" else None)
    with named_failures(mesh):
        how = (mesh, schedule, asked.zero, asked.precision)
        cases = verify_decoder(*how) if subject is None else {asked.target: verify(subject, *how)}
    if mesh.world.rank == 0:
        pipeline = "" if schedule is None else f", pp={pp}, {asked.chunks} chunks, {microbatches} micro-batches"
        zero = f", dp={dp}, ZeRO-{1 if asked.zero is None else asked.zero}, {asked.precision}" if dp > 1 or sharded else ""
        print_cases(cases, f"tp={tp}{zero}{pipeline}", asked.precision, each=subject is not None)
    mesh.close()
    return 0 if all(check.passed for checks in cases.values() for check in checks) else 1


def _plan(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="megapar plan", description="What a run will need, on paper.")
    plan = parser.add_subparsers(dest="what", required=True).add_parser("schedule", help="a pipeline schedule: proven, simulated, drawn")
    plan.add_argument("file", nargs="?", type=Path, help="a schedule's file, megapar's or torch's; none: make one")
    plan.add_argument("--pp", type=int, help="pipeline ranks")
    plan.add_argument("--chunks", type=int, help="stages a rank (default: 1)")
    plan.add_argument("--microbatches", type=int, help="micro-batches a step")
    plan.add_argument("--group", type=int, help="micro-batches that go through a chunk before the next chunk's turn (default: pp)")
    plan.add_argument("--schedule", choices=KINDS, help="default: 1f1b, interleaved with several chunks")
    plan.add_argument("--zero-bubble", action="store_true", help="split the backward; weight gradients go where the bubbles are")
    plan.add_argument("--costs", default="1,1,1", help="times of F, I, W and a message, in any unit (default: 1,1,1,0)")
    plan.add_argument("--out", type=Path, default=Path("schedule.svg"), help=".svg .png .pdf .json (Perfetto) .csv (default: schedule.svg)")
    asked = parser.parse_args(arguments)
    costs, shape = parse_costs(asked.costs), (asked.schedule, asked.pp, asked.chunks, asked.microbatches, asked.group)
    if asked.file and any(value is not None for value in shape):
        raise ValueError(f"{asked.file} is a schedule already: give it alone, or leave it out and give --pp, --microbatches and the rest")
    if not asked.file and (asked.pp is None or asked.microbatches is None):
        raise ValueError("a schedule needs --pp and --microbatches, or a file")
    if asked.file and not asked.file.is_file():
        raise ValueError(f"schedule {asked.file} is not a file: give the path of a .csv, or --pp and --microbatches")
    if asked.file:
        schedule = Schedule.load(asked.file)
    else:
        chunks = 1 if asked.chunks is None else asked.chunks
        schedule = make_schedule(asked.schedule, asked.pp, chunks, asked.microbatches, asked.group, costs)
    if asked.zero_bubble and not schedule.has("W"):
        schedule = split_backward(schedule, costs)
    print(plan_schedule(schedule, costs, asked.out))
    return 0


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="megapar report", description="A page on a run, from its metrics.")
    parser.add_argument("run", type=Path, help="a run's folder")
    run = parser.parse_args(arguments).run
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} holds no metrics.jsonl: give the folder of a run, its --out")
    print(", ".join(map(str, write_report(run / "metrics.jsonl", run / "report.html"))))
    return 0


def _doctor(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="megapar doctor", description="What this installation can do.").parse_args(arguments)
    print(doctor())
    return 0
