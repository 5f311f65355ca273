"""When reductions start, and what is left of a step that ended or was dropped."""



from megapar import ParallelMesh
from tests.zero.common import reduced, wrapped
from tests.zero.test_buckets import WAYS, Many, chain, data, expected_of, run


def starts_early() -> None:
    """From the second step on, reductions start while backward goes on: all but the last are under way or done when it ends."""
    mesh, use = ParallelMesh(), chain(0, 1, 2, 3, 4)
    optimizer = wrapped(Many(), mesh, stage=1, bucket_bytes=1)
    grads, model = optimizer.grads, optimizer.chunks[0]
    early: list[int] = []
    real = grads.end_window

    def end_window(chunk: int | None = None) -> None:
        if grads._ends:
            early.append(sum(grads._started))
        real(chunk)

    grads.end_window = end_window
    for step in range(3):
        for m in range(2):
            optimizer.backward(model(data(mesh.dp.rank, step, m), use).square().sum(), last=m == 1)
        optimizer.step(6)
    count = len(grads.layout.buckets)
    assert early[0] == 0 and early[1] == early[2] >= count - 1, (early, count)


def test_reductions_start_while_backward_goes_on(ranks):
    ranks.run(2, starts_early)


def dropped() -> None:
    """zero_grad between backward and step, after reductions have started: they end where they began."""
    mesh, use = ParallelMesh(), chain(0, 1, 2, 3, 4)
    for way in WAYS:
        optimizer = wrapped(Many(), mesh, **way)
        model = optimizer.chunks[0]
        for step in range(4):
            optimizer.backward(model(data(mesh.dp.rank, 99 + step, 0), use).square().sum())
            optimizer.zero_grad()
            optimizer.backward(model(data(mesh.dp.rank, step, 0), use).square().sum())
            optimizer.grads.finish()
            for got, want in zip(reduced(optimizer).values(), expected_of([[use]] * mesh.dp.size, step, ()), strict=True):
                assert want.numel() == 0 or float((got - want).abs().max()) <= 1e-5 * max(float(want.abs().max()), 1e-3), (way, step)
            optimizer.grads.zero()


def test_zero_grad_after_a_reduction(ranks):
    ranks.run(2, dropped)


def leftovers() -> None:
    """No .grad; pooled main_grads are gone after the reduction, others stay."""
    mesh = ParallelMesh()
    for stage in (0, 1, 2, 3):
        optimizer = wrapped(Many(), mesh, stage=stage)
        run(optimizer, 0, [chain(0, 1, 2, 3, 4)] * 2)
        gone = [param.main_grad is None for param in optimizer.grads.params]
        assert all(gone) if stage >= 2 else not any(gone)
        assert all(param.grad is None for param in optimizer.grads.params)
        optimizer.step(6)


def test_what_is_left_after_a_reduction(ranks):
    ranks.run(2, leftovers)
