"""Every schedule, ours and torch's, has one process's gradients; sleeps against the simulation."""

import torch

from benchmarks import pipeline, pipeline_host


def pipeline_once() -> tuple[dict[str, float], list[float]]:
    """Gradient errors by contender; whether host times are positive."""
    sizes = pipeline.Sizes(layers=5, hidden=32, heads=4, ffn=48, vocab=40, b=1, s=8)
    found = [pipeline.contender(sizes, name) for name in pipeline.ALL_OURS + pipeline.EAGER]
    return pipeline.errors(found, sizes), pipeline_host.host_seconds(1)[0][0]


def test_pipeline(ranks):
    """Every schedule, ours and torch's, gives one process's gradients."""
    for errors, host in ranks.run(2, pipeline_once):
        assert list(errors) == pipeline.ALL_OURS + pipeline.EAGER
        assert all(error <= pipeline.AGREE for error in errors.values()), errors
        assert all(second > 0 for second in host)


def asleep_once() -> tuple[list[list[list[float]]], list[float], list[int]]:
    return pipeline_host.asleep(0.1, 1)


def test_pipeline_asleep(ranks):
    """No schedule is faster than its simulation; the bar is on the distance from it, both ways."""
    seconds, simulated, actions = ranks.run(2, asleep_once)[0]
    assert all(measured > 0.99 * least for measured, least in zip(seconds[0][0], simulated, strict=True))
    assert actions[0] > 2 * pipeline_host.MICRO_BATCHES, "sends and receives are actions too"
    exact = torch.tensor([simulated, simulated], dtype=torch.float64)[:, None]
    for factor, holds in ((1.0, True), (1.03, False), (0.97, False)):
        assert all(v.holds == holds for v in pipeline_host.grid_of_sleeps(0.1, factor * exact, simulated, actions)[1])
