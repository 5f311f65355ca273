"""The linear ops' kernels as compiled: no spills, tensor cores, 128 bits an access, and room for the programs that tiles.py means.

HMMA on sm_80, HGMMA (wgmma) on sm_90, UTCHMMA (tcgen05) on sm_100. Triton 3.7.1 has no tensor cores on sm_75: FMAs, as for fp32 everywhere.

Compiled: kernel x dtype x activation or target and beta x every combination of the arguments that may be left out (each is a kernel of its
own) x every candidate of tiles.py, all that autotuning may choose too.
"""

import functools
import re
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.ops.triton import gemm, linear_bias_grad, tiles
from megapar.ops.triton import linear as ops
from megapar.ops.triton.ahead_of_time import Compiled, compile_launch
from megapar.ops.triton.launch import Launch
from tests.aot.common import TARGETS, Call, assert_lean, config, every_config, launches, meta

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M, N, K = 2048, 4096, 1024


def forward(activation: str, dtype: torch.dtype, t: int, n: int, k: int, biased: bool = True, save: bool = True) -> None:
    """save: with the pre-activation."""
    out = 2 * n if activation == "swiglu" else n
    ops.linear(meta(t, k, dtype=dtype), meta(out, k, dtype=dtype), meta(out, dtype=dtype) if biased else None, activation, save)


def input_grad(activation: str, dtype: torch.dtype, t: int, n: int, k: int) -> None:
    z = None if activation == "none" else meta(t, 2 * n if activation == "swiglu" else n, dtype=dtype)
    ops.linear_input_grad(meta(t, k, dtype=dtype), meta(k, n, dtype=dtype), z, activation)


def weight_grad(into: torch.dtype, beta: float, scaled: bool, flagged: bool, dtype: torch.dtype, m: int, n: int, t: int) -> None:
    """scaled: by a number on the device. flagged: asked for numbers that are not finite."""
    scale, flag = (meta(1, dtype=FP32) if given else None for given in (scaled, flagged))
    dy, x, target = meta(t, m, dtype=dtype), meta(t, n, dtype=dtype), meta(m, n, dtype=into)
    ops.linear_weight_grad_(target, dy, x, beta, 1.0, scale, flag)


def gemms(dtype: torch.dtype) -> dict[str, Call]:
    """Without a size yet."""
    calls: dict[str, Call] = {}
    for kind in ops.ACTIVATIONS:
        calls[f"input_grad-{kind}"] = functools.partial(input_grad, kind, dtype)
        # Without an activation there is nothing to save.
        for biased, save in product((True, False), (True, False) if kind != "none" else (False,)):
            name = f"forward-{kind}" + "-bias" * biased + "-save" * save
            calls[name] = functools.partial(forward, kind, dtype, biased=biased, save=save)
    for into, beta, scaled, flagged in product(dict.fromkeys((FP32, dtype)), (0.0, 1.0), (True, False), (True, False)):
        name = f"weight_grad-{str(into)[6:]}-beta={beta:.0f}" + "-scale" * scaled + "-flag" * flagged
        calls[name] = functools.partial(weight_grad, into, beta, scaled, flagged, dtype)
    return {f"{str(dtype)[6:]}-{name}": call for name, call in calls.items()}


def in_every_tile(call: Call, arch: int) -> list[Launch]:
    """What `call` would launch, in each tile that dispatch may choose for it."""
    listed: list[tiles.Tile] = []

    def pick(rows, columns, dtype, target, epilogue, vectors):
        listed[:] = listed or tiles.candidates(dtype, target.arch, epilogue, vectors)
        return listed.pop(0)

    found = []
    with mock.patch.object(gemm, "choose", pick):
        while listed or not found:
            found += launches(call, arch)
    return found


def every_launch() -> list[pytest.param]:
    cases = []
    for arch in TARGETS:
        for dtype in (BF16, FP16, FP32) if arch >= 80 else (FP16,):
            for name, call in gemms(dtype).items():
                for launch in in_every_tile(functools.partial(call, M, N, K), arch):
                    size = f"{launch.options['BLOCK_M']}x{launch.options['BLOCK_N']}"
                    marks = () if (arch, name, size) in SUBSET else (pytest.mark.every_config,)
                    cases.append(pytest.param(launch, arch, id=f"{name}-{size}-sm_{arch}", marks=marks))
    return cases


SUBSET = (
    (90, "bfloat16-forward-gelu-bias-save", "128x256"),
    (90, "bfloat16-forward-swiglu-bias-save", "128x128"),
    (90, "bfloat16-input_grad-swiglu", "128x64"),
    (90, "bfloat16-weight_grad-float32-beta=1-scale-flag", "128x128"),
)


@pytest.mark.parametrize(("launch", "arch"), every_launch())
def test_compiled(launch, arch):
    kernel, options = compile_launch(launch, arch), launch.options
    assert_lean(kernel)
    assert kernel.shared <= tiles.shared(arch)
    operand = next(x.dtype for x in launch.args if isinstance(x, torch.Tensor))
    accumulators = 2 if launch.kernel is ops.linear_kernel and options["ACTIVATION"] == "swiglu" else 1
    products = accumulators * options["BLOCK_M"] * options["BLOCK_N"] * options["BLOCK_K"]
    on_tensor_cores = arch >= 80 and operand != FP32
    if not on_tensor_cores:
        # An FFMA2 is two; an epilogue has some of its own.
        assert (kernel.count("FFMA") + kernel.count("FFMA2")) * 32 * kernel.num_warps >= products, kernel
        assert kernel.count("(H|Q|UTC)?[A-Z]*GMMA|HMMA") == 0, "nothing rounds fp32 to TF32"
    elif arch == 100:
        # Whole tiles, 16 numbers deep; Triton writes the instructions of a step twice.
        assert kernel.count("UTCHMMA") == 2 * accumulators * options["BLOCK_K"] // 16, kernel
    else:
        assert multiplications(kernel) == products, kernel
    # The interpreter's exp has no error that could tell: sigmoid splits its argument (exp.py), once for each element.
    activated = options.get("ACTIVATION", "none") != "none"
    assert kernel.count("FRND") >= activated * options["BLOCK_M"] * options["BLOCK_N"] // (32 * kernel.num_warps), kernel
    # One large program, or more small ones; two where the products are FMAs. Turing has room for one.
    programs = kernel.occupancy() * (32 if arch == 75 else 64) / kernel.num_warps
    assert programs >= (1 if arch == 75 else 2 if options["BLOCK_M"] == 64 else 1), kernel
    check_widths(kernel, launch)


def multiplications(kernel: Compiled) -> int:
    """What HMMA, of a warp, and HGMMA, of four, multiply in a program, each instruction once: in one step along K."""
    total = 0
    for opcode, count in kernel.instructions.items():
        if opcode.startswith("HMMA.16816."):
            total += count * kernel.num_warps * 16 * 8 * 16
        elif found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
            total += count * kernel.num_warps // 4 * int(found[1]) * int(found[2]) * int(found[3])
    return total


def check_widths(kernel: Compiled, launch: Launch) -> None:
    """128 bits a copy of an operand, a load of z or of the target, and a store; bias, scale and flag are what is narrower."""
    options, (_, _, c, d, *_) = launch.options, launch.args
    tile = options["BLOCK_M"] * options["BLOCK_N"] // (16 * 32 * options["num_warps"])
    pair = options.get("ACTIVATION") == "swiglu"
    if launch.kernel is ops.linear_kernel:
        loads, stores = None, tile * d.dtype.itemsize * (1 + (launch.args[4] is not None) * (1 + pair))
    elif launch.kernel is ops.linear_input_grad_kernel:
        loads, stores = tile * d.dtype.itemsize * ((c is not None) + pair), tile * d.dtype.itemsize * (1 + pair)
    else:
        loads, stores = tile * c.dtype.itemsize * options["ACCUMULATE"], tile * c.dtype.itemsize
    assert kernel.count(r"STG\..*128") == stores and kernel.count("STG") <= stores + 1, kernel
    if kernel.arch >= 80:
        assert kernel.count("LDGSTS") == kernel.count(r"LDGSTS\..*128") > 0, kernel
        assert loads is None or (kernel.count(r"LDG\..*128") == loads and kernel.count(r"LDG\.") <= loads + 1), kernel


any_size, any_dtype, any_arch = st.integers(1, 9000), st.sampled_from([BF16, FP16, FP32]), st.sampled_from(sorted(TARGETS))


@functools.cache
def compiled_for(arch: int) -> set[tuple[object, ...]]:
    vectors = {config(case.values[0]) for case in every_launch() if case.values[1] == arch}
    # Compiled by test_odd_widths.py.
    odd = [launches(functools.partial(call, M, 2731, K), arch) for dtype in (BF16, FP16) for call in gemms(dtype).values()]
    return vectors | {config(launch) for found in odd for launch in found}


@settings(deadline=None)
@given(any_size, any_size, any_size, any_dtype, any_arch, st.data())
def test_list_is_complete(t, n, k, dtype, arch, data):
    if arch == 75:
        dtype = FP16
    call = data.draw(st.sampled_from(list(gemms(dtype).values())))
    assert {config(x) for x in launches(lambda: call(t, n, k), arch)} <= compiled_for(arch)


def bias_grad(dtype: torch.dtype, into: torch.dtype, beta: float, t: int = 4096, n: int = 4096) -> None:
    ops.linear_bias_grad_(meta(n, dtype=into), meta(t, n, dtype=dtype), beta)


BIAS_CALLS = {
    f"{str(dtype)[6:]}-into-{str(into)[6:]}-beta={beta:.0f}-{t}": functools.partial(bias_grad, dtype, into, beta, t)
    for dtype in (BF16, FP16, FP32)
    for into in dict.fromkeys((FP32, dtype))
    for beta in (0.0, 1.0)
    for t in (512, 4096)
}


@every_config(BIAS_CALLS, ["bfloat16-into-float32-beta=1-4096"], least=75)
def test_bias_grad(call, arch):
    for recorded in launches(call, arch):
        kernel = compile_launch(recorded, arch)
        assert_lean(kernel)
        of_thread = linear_bias_grad.BLOCK_M * linear_bias_grad.BLOCK_N // (32 * kernel.num_warps)
        loads = of_thread * recorded.args[0].dtype.itemsize // 16
        assert kernel.count(r"LDG\..*128") >= loads and kernel.occupancy() >= 0.5, kernel


@given(any_size, any_size, any_dtype, st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_list_of_bias_grads_is_complete(t, n, dtype, into_fp32, beta):
    listed = {config(x) for call in BIAS_CALLS.values() for x in launches(call, 80)}
    assert {config(x) for x in launches(lambda: bias_grad(dtype, FP32 if into_fp32 else dtype, beta, t, n), 80)} <= listed
