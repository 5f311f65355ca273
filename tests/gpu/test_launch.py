"""What only a device can show of `launch`."""

import pytest
import torch

from megapar.ops.swiglu import swiglu
from tests.row_ops import normal


def test_current_device_is_not_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = normal(5, 64, dtype=torch.bfloat16)
    assert torch.equal(swiglu(x.to("cuda:1")).cpu(), swiglu(x.to("cuda:0")).cpu())
    assert torch.cuda.current_device() == 0


def test_current_stream():
    """A kernel waits for what its stream was given before it."""
    x, stream = torch.zeros(4096, 8192, dtype=torch.bfloat16), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1.0)
        y = swiglu(x)
    stream.synchronize()
    assert y.min() > 0.7
