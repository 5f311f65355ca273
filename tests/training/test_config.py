"""The config: files, overrides, and one sentence for each thing that makes no run."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.models.config import DecoderConfig
from megapar.training.config import (
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RecoveryConfig,
    RunConfig,
)
from megapar.training.config_file import check, from_dict, load_config, to_dict
from megapar.training.sections import Rates, batches_of, micro_batch_size, policy_of, rates_of, schedule_of, steps_of, with_dp

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert load_config(path) != Config()


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        from_dict(Config, values)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(
    st.builds(DataConfig, st.text(), st.none() | st.integers(), sequence_length=st.integers(1, 9)),
    st.builds(ObjectiveConfig, st.sampled_from(["causal_lm", "ul2"]), target_ratio=st.none() | st.floats(0, 1)),
    st.builds(OptimizerConfig, betas=st.tuples(st.floats(0, 1), st.floats(0, 1)), max_norm=st.none() | st.floats(0.1, 9)),
    st.builds(ParallelConfig, st.integers(1, 9), dp=st.just("auto") | st.integers(1, 9), device=st.sampled_from(["auto", "cpu", "cuda"])),
    st.builds(RunConfig, resume=st.sampled_from(["no", "yes", "auto"]), batch_size=st.integers(1, 9) | st.text(), prompt=st.text()),
    st.builds(DecoderConfig, heads=st.sampled_from([4, 8]), kv_heads=st.sampled_from([None, 2, 4])),
)
def test_dict_round_trip(data, objective, optimizer, parallel, run, model):
    config = Config(model, data, objective, optimizer, parallel, run)
    assert from_dict(Config, to_dict(config)) == config


def test_toml_values_reach_the_config(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[model]\nheads = 4\nkv_heads = 2\n[optimizer]\nlr = 1\nbetas = [0, 0.5]\n[run]\nout = "x"\n')
    config = load_config(path)
    assert (config.model.heads, config.model.kv_heads, config.run.out) == (4, 2, "x")
    assert (config.optimizer.lr, config.optimizer.betas) == (1.0, (0.0, 0.5))
    assert isinstance(config.optimizer.lr, float)
    assert config.run.steps == RunConfig.steps


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"run": {"stepz": 3}}, "run.stepz", "run.steps"),
        ({"modle": {}}, "modle", "model"),
        ({"model": {"kvheads": 2}}, "model.kvheads", "model.kv_heads"),
        ({"run": {"": 1}}, "run.", "run."),
    ],
)
def test_unknown_key_names_the_nearest(values, key, nearest):
    message = refused(values)
    assert f'"{key}"' in message
    assert f'nearest one is "{nearest}' in message


@pytest.mark.parametrize(
    ("section", "key", "value", "wanted"),
    [
        ("run", "steps", "3", "int"),
        ("run", "steps", 3.0, "int"),
        ("run", "steps", True, "int"),
        ("run", "tensorboard", 1, "bool"),
        ("run", "batch_size", 3.5, "int or str"),
        ("parallel", "dp", "all", "int or 'auto'"),
        ("run", "resume", True, "'no' or 'yes' or 'auto'"),
        ("run", "out", 3, "str"),
        ("optimizer", "lr", "fast", "float"),
        ("optimizer", "lr", True, "float"),
        ("optimizer", "betas", [0.9], "tuple[float, float]"),
        ("optimizer", "betas", [0.9, "x"], "float"),
        ("optimizer", "max_norm", "none", "float or none"),
        ("parallel", "device", "tpu", "'cpu'"),
        ("model", "norm", "batch", "'rms' or 'layer'"),
        ("recompute", "mode", "selective", "'none' or 'full' or 'attention' or 'mlp'"),
        ("precision", "kind", "fp8", "'fp32' or 'bf16' or 'fp16'"),
        ("model", "kv_heads", 2.0, "int or none"),
    ],
)
def test_wrong_types_name_key_value_and_type(section, key, value, wanted):
    message = refused({section: {key: value}})
    assert f'"{section}.{key}"' in message
    assert wanted in message


def test_section_must_be_a_table():
    assert "write [run]" in refused({"run": 3})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--run.steps 0", "run.steps=0 must be above 0"),
        ("--run.batch-size -4", "run.batch_size=-4"),
        ("--run.micro-batch-size 0", "run.micro_batch_size=0"),
        ("--data.sequence-length 0", "data.sequence_length=0"),
        ("--tp -1", "parallel.tp=-1"),
        ("--pp 0", "parallel.pp=0"),
        ("--chunks 0", "parallel.chunks=0"),
        ("--microbatches 0", "run.microbatches=0"),
        ("--microbatches 5", "run.batch_size=16 must be a multiple of run.microbatches=5"),
        ("--microbatches 2 --run.micro-batch-size 4", "x run.microbatches=2 must be run.batch_size=16"),
        ("--parallel.timeout 0", "parallel.timeout=0"),
        ("--optimizer.lr 0", "optimizer.lr=0.0"),
        ("--optimizer.lr nan", "optimizer.lr=nan"),
        ("--optimizer.max-norm 0", "optimizer.max_norm=0.0"),
        ("--optimizer.min-lr nan", "optimizer.min_lr=nan"),
        ("--optimizer.min-lr 0.5", "optimizer.min_lr=0.5 must not be above optimizer.lr=0.001"),
        ("--optimizer.eps -1", "optimizer.eps=-1"),
        ("--optimizer.weight-decay -1", "optimizer.weight_decay=-1"),
        ("--optimizer.warmup -1", "[optimizer] warmup=-1"),
        ("--optimizer.warmup 1001", "[optimizer] warmup=1001.0 is longer than the run, 1000"),
        ("--optimizer.schedule wsd --optimizer.warmup 600 --optimizer.decay 500", "are longer than the run together"),
        ("--optimizer.schedule inverse_sqrt --optimizer.warmup 0", "give it one"),
        ("--optimizer.weight-decay-end -1", "optimizer.weight_decay_end=-1"),
        ("--optimizer.z-loss -1", "optimizer.z_loss=-1"),
        ("--run.length 5M", 'run.length="5M" must be an amount of samples or tokens'),
        ("--run.length 5X_tokens", 'run.length="5X_tokens"'),
        ("--run.keep-last -1", "run.keep_last=-1"),
        ("--data.skip 9:3", '"9:3" must be two sample numbers'),
        ("--recovery.spike rollback", "run.save_every=0 writes none"),
        ("--recovery.window 1", "recovery.window=1 must be 2 or more"),
        ("--recovery.back -1", "recovery.back=-1"),
        ("--recovery.max-rollbacks -1", "recovery.max_rollbacks=-1"),
        ("--recovery.max-skips -1", "recovery.max_skips=-1"),
        ("--recovery.sigma 0", "recovery.sigma=0.0"),
        ("--recovery.sigma nan", "recovery.sigma=nan"),
        ("--recovery.factor 1", "recovery.factor=1.0"),
        ("--recovery.spike skip --recovery.sigma None", "needs recovery.sigma or recovery.factor"),
        ("--recovery.spike rollback --save-every 20 --run.keep-last 3 --recovery.back 100", "run.keep_last=3 removes: keep 7, or all"),
        ("--recovery.preset palm --recovery.back 5", "recovery.back=5 beside recovery.preset=palm, which sets it"),
        ("--optimizer.betas 0.9 1", "optimizer.betas=(0.9, 1.0)"),
        ("--run.eval-every -1", "run.eval_every=-1"),
        ("--save-every -1", "run.save_every=-1"),
        ("--run.sample-tokens -1", "run.sample_tokens=-1"),
        ("--run.batch-size 6 --run.micro-batch-size 4", "run.batch_size=6 must be a multiple of run.micro_batch_size=4"),
        ("--recompute.blocks 2", "recompute blocks=2 needs something to recompute"),
        ("--recompute full --recompute.blocks -1", "recompute blocks=-1 must be 0 or more"),
        ("--recompute full --recompute.blocks 5", "recompute blocks=5 is more than the 4 of a stage"),
        ("--recompute mlp --recompute.shard-saved-input", 'is for mode="full", the mode is "mlp"'),
        ("--recompute full --recompute.shard-saved-input", "shard_saved_input=True needs ranks to shard over and tp is 1"),
        (
            "--tp 2 --parallel.sequence-parallel --recompute full --recompute.shard-saved-input",
            "with sequence parallelism, whose inputs are sharded already",
        ),
        ("--zero 4", "parallel.zero_stage=4 must be 0, 1, 2 or 3"),
        ("--dp 3 --run.batch-size 16", "run.batch_size=16 must be a multiple of run.microbatches=1 x parallel.dp=3"),
        ("--precision fp16 --precision.master none --precision.loss-scale 0", "init_scale=0.0 must be positive"),
        ("--precision fp16 --precision.master remainder", "master='remainder' splits bfloat16 and parameters are float16"),
        ("--precision fp32 --precision.master fp32", "master='fp32' would copy parameters that are fp32 themselves"),
        ("--precision fp16 --precision.init-scale 0.5", "init_scale=0.5 is below min_scale=1.0"),
        ("--precision fp16 --precision.hysteresis 0", "hysteresis=0 must be above 0"),
        ("--model.positions learned --model.max-positions 8", "data.sequence_length=256 is longer than model.max_positions=8"),
    ],
)
def test_check_refuses_in_a_sentence_with_value_and_fix(override, told):
    with pytest.raises(ValueError) as error:
        load_config(None, override.split())
    message = str(error.value)
    assert told in message
    assert ": " in message, "the fix follows a colon"
    assert "\n" not in message


def test_micro_batches_by_their_size_or_their_number():
    def size(**values: int) -> int:
        return micro_batch_size(Config(run=RunConfig(batch_size=12, **values)))

    assert [size(), size(microbatches=3), size(micro_batch_size=3), size(micro_batch_size=3, microbatches=4)] == [12, 4, 3, 3]


def ramped(dp: Any = 1, pp: int = 1, chunks: int = 1, **run: Any) -> Config:
    return Config(parallel=ParallelConfig(dp=dp, pp=pp, chunks=chunks), run=RunConfig(**run), data=DataConfig(sequence_length=10))


def test_a_batch_that_grows_is_cut_into_micro_batches_of_one_size():
    config = ramped(dp=2, batch_size="0:8 80:12 240:24")
    assert micro_batch_size(config) == 2, "what all sizes have in common, over dp"
    assert [schedule_of(config, size).microbatches for size in (8, 12, 24)] == [2, 3, 6]
    assert micro_batch_size(ramped(batch_size="0:8 80:12", micro_batch_size=4)) == 4
    check(config)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ramped(dp=2, batch_size="0:8 80:12", micro_batch_size=3), "batch size 8 (stage 0, from sample 0) must be a multiple of dp=2"),
        (ramped(batch_size="0:8 80:12", microbatches=4), "does not go with a batch that changes: give run.micro_batch_size"),
        (ramped(batch_size="0:8 80:12", rampup="2 2 40"), "make that a number"),
        (ramped(batch_size="8:8 80:12"), "must begin at 0"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_when_the_config_is_read(config, told):
    with pytest.raises(ValueError) as error:
        check(config)
    assert told in str(error.value)


def test_length_in_samples_and_tokens_is_so_many_steps():
    assert steps_of(ramped(batch_size=8, length="800 samples")) == 100
    assert steps_of(ramped(batch_size=8, length="8K tokens")) == 100
    assert steps_of(ramped(batch_size="0:8 80:20", length="480 samples")) == 10 + 20
    assert batches_of(ramped(batch_size=20, rampup="8 12 80")) == batches_of(ramped(batch_size="0:8 80:20"))


def at_each_step(rates: Rates, steps: int) -> list[float]:
    found, samples = [], 0
    for step in range(steps):
        size = rates.batches.batch_at(samples)
        found.append(rates.at(step, samples, size)[0])
        samples += size
    return found


@pytest.mark.parametrize("unit", ["steps", "samples", "tokens"])
def test_in_every_unit_the_last_step_has_the_floor_and_the_first_a_share_of_the_peak(unit):
    config = dataclasses.replace(
        ramped(batch_size="0:8 80:20", length="480 samples"),
        optimizer=OptimizerConfig(lr=1.0, min_lr=0.25, warmup={"steps": 4, "samples": 32, "tokens": 320}[unit], schedule_unit=unit),
    )
    rates = at_each_step(rates_of(config), 30)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[-1] == 0.25 and min(rates[4:-1]) > 0.25


def test_a_smaller_batch_has_a_lower_rate_where_asked_for():
    config = ramped(batch_size="0:5 80:20", steps=40)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(lr=1.0, schedule="constant", warmup=0.0, batch_scaling="sqrt"))
    assert [rates_of(config).at(1, samples, size)[0] for samples, size in ((0, 5), (80, 20))] == [0.5, 1.0]


def test_weight_decay_moves_to_its_end():
    config = dataclasses.replace(ramped(steps=10), optimizer=OptimizerConfig(weight_decay=0.0, weight_decay_end=1.0))
    assert [rates_of(config).at(step, 0, 1)[1] for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rates_of(ramped(steps=10)).at(3, 0, 1)[1] == 0.1, "it stays without an end"


def test_auto_replicas_are_what_the_world_makes():
    config = ramped(dp="auto", pp=2, batch_size=12)
    check(config)
    assert with_dp(config, 6).parallel.dp == 3
    assert with_dp(ramped(dp=5), 6).parallel.dp == 5


def test_the_palm_preset_goes_back_100_steps_and_past_300():
    config = dataclasses.replace(ramped(save_every=20), recovery=RecoveryConfig(preset="palm"))
    check(config)
    policy = policy_of(config)
    assert (policy.spike, policy.back, policy.skip_before + 1 + policy.skip_after) == ("rollback", 100, 300)


def test_overrides_and_aliases_win_over_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[run]\nsteps = 7\nseed = 1\n[data]\ncorpus = "a"\n')
    short = "--corpus b --tokenizer bytes --save-every 5 --resume yes --tp 3 --steps 9 --out o --seed 4"
    short += " --recompute mlp --precision bf16 --dp 2 --zero 3"
    long = "--data.corpus b --data.tokenizer bytes --run.save-every 5 --run.resume yes --parallel.tp 3 --run.steps 9"
    long += " --run.out o --run.seed 4"
    long += " --recompute.mode mlp --precision.kind bf16 --parallel.dp 2 --parallel.zero-stage 3"
    config = load_config(path, short.split())
    assert config == load_config(path, long.split())
    assert config.data == dataclasses.replace(DataConfig(), corpus="b", tokenizer="bytes")
    assert config.parallel.tp == 3
    assert (config.recompute, config.precision) == (RecomputeConfig("mlp"), PrecisionConfig("bf16"))
    assert config.run == RunConfig(steps=9, seed=4, save_every=5, resume="yes", out="o")


def test_override_of_one_size_keeps_the_rest_of_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[model]\nhidden_size = 96\nheads = 6\n")
    assert load_config(path, ["--model.layers", "3"]).model == DecoderConfig(hidden_size=96, heads=6, layers=3)


@pytest.mark.parametrize(("override", "nearest"), [("--stepz", "--run.steps"), ("--optimizer.lrr", "--optimizer.lr")])
def test_unknown_override_exits_with_2_and_names_the_nearest(override, nearest, capsys):
    with pytest.raises(SystemExit) as end:
        load_config(None, [override, "3"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert override in told
    assert nearest in told


def test_sizes_that_contradict_each_other_in_overrides_exit_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        load_config(None, ["--model.heads", "7"])
    assert end.value.code == 2
    assert "model.heads=7" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "told"), [(b"[run\n", "not valid TOML"), (b"\xff\xfe", "not valid TOML"), (None, "is not a file")])
def test_bad_files_are_named(tmp_path, text, told):
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ValueError, match=told) as error:
        load_config(path)
    assert str(path) in str(error.value)
