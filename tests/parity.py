"""One model alone and in parallel: raw gradients against the bounds that megapar promises.

    |gradient error| <= max(4 x the one-process fp32 error against fp64, 1e-6 x the model's largest gradient)
"""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from megapar.params import Modules, named_specs

Values = dict[tuple[str, tuple[int, ...]], Tensor]
"""By global name and start of the box."""


def logical(model: Modules, value: Callable[[nn.Parameter], Tensor | None]) -> Values:
    """This rank's boxes, by global name: clones of `value(param)` cut as the parameter is."""
    found: Values = {}
    for _, param, spec in named_specs(model):
        local = value(param)
        if local is not None:
            for piece, view in spec.views(local):
                found[piece.name, piece.start] = view.detach().clone()
    return found


def boxes(model: Modules, whole: Values) -> Values:
    """The boxes of `model` cut from whole logical tensors, those of the model alone."""
    full = {name: value for (name, _), value in whole.items()}
    return {(p.name, p.start): full[p.name][p.index] for _, _, spec in named_specs(model) for p in spec.pieces}


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Values]:
    """(loss, raw gradients by global name) of one backward in plain PyTorch."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    return value.detach(), logical(model, lambda p: p.grad)


def assert_same_gradients(alone: nn.Module, parallel: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """Both fp32, `alone` whole; `loss` returns the same scalar for either, and for the fp64 copy of `alone`."""
    exact_loss, exact = gradients(copy.deepcopy(alone).double(), loss)
    alone_loss, single = gradients(alone, loss)
    parallel_loss, local = gradients(parallel, loss)
    floor = 1e-6 * max(float(g.abs().max()) for g in exact.values())
    worst = 4 * abs(float(alone_loss) - float(exact_loss))
    assert abs(float(parallel_loss) - float(exact_loss)) <= max(worst, 1e-6 * abs(float(exact_loss))), "loss"
    for key, expected in boxes(parallel, exact).items():
        single_error = max(float((single[k] - exact[k]).abs().max()) for k in exact if k[0] == key[0])
        bound = max(4 * single_error, floor)
        error = float((local[key] - expected).abs().max())
        assert error <= bound, f"{key[0]}: error {error:.2e} above {bound:.2e}"
