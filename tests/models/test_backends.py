"""A decoder computes the same with the compiled kernels and with the plain PyTorch reference."""

import copy

import pytest
import torch
from torch import Tensor, nn

from megapar import ParallelMesh, vocab_parallel_cross_entropy
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.ops import dispatch
from tests.parity import Values, gradients

SIZES = {"hidden_size": 48, "layers": 2, "heads": 6, "ffn_size": 80, "init_std": 0.2}
CONFIGS = {
    "llama": DecoderConfig(**SIZES, kv_heads=2),
    "gpt": DecoderConfig(**SIZES, kv_heads=6, norm="layer", positions="learned", activation="gelu", bias=True, max_positions=16),
}
TOKENS = torch.randint(0, 71, (2, 13), generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module) -> Tensor:
    losses = vocab_parallel_cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:].reshape(-1), tp=None, label_smoothing=0.1, z_loss=1e-3)
    return losses.sum()


def both(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Tensor, Values], ...]:
    """(loss, gradients) of the kernels and of the reference."""
    kernels = gradients(model, loss)
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    return kernels, gradients(model, loss)


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32(name, monkeypatch):
    """Each within 4 times the error of the other against fp64, or 1e-6 of the largest gradient: neither is worse than its rounding."""
    model = Decoder(CONFIGS[name], 71, ParallelMesh.alone())
    exact_loss, exact = gradients(copy.deepcopy(model).double(), loss)
    found = both(model, monkeypatch)
    floor = 1e-6 * max(float(g.abs().max()) for g in exact.values())
    errors = [{key: float((values[key] - exact[key]).abs().max()) for key in exact} for _, values in found]
    for key in exact:
        for mine, other in (errors, errors[::-1]):
            assert mine[key] <= max(4 * other[key], floor), f"{key}: kernels {errors[0][key]:.1e}, reference {errors[1][key]:.1e}"
    assert all(abs(float(value) - float(exact_loss)) <= 1e-6 * float(exact_loss) for value, _ in found)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16(name, monkeypatch):
    """By Frobenius norm, within twice the reference's error."""
    model = Decoder(CONFIGS[name], 71, ParallelMesh.alone(), dtype=torch.bfloat16)
    _, exact = gradients(copy.deepcopy(model).double(), loss)
    kernels, reference = (values for _, values in both(model, monkeypatch))
    for key, wanted in exact.items():
        ours, theirs = (float((values[key].double() - wanted).norm()) for values in (kernels, reference))
        assert ours <= max(2 * theirs, 2.0**-8 * float(wanted.norm())), f"{key}: {ours:.2e} against {theirs:.2e}"
