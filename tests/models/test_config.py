"""A decoder that cannot be is refused in a sentence, when it is described."""

import pytest

from megapar.models.config import DecoderConfig, gpt_style


@pytest.mark.parametrize(
    "values,told",
    [
        ({"layers": 0}, "model.layers=0 must be 1 or more"),
        ({"kv_heads": -1}, "model.kv_heads=-1 must be 1 or more"),
        ({"head_size": 0}, "model.head_size=0 must be 1 or more"),
        ({"heads": 6, "hidden_size": 60, "kv_heads": 4}, "model.heads=6 must be a multiple of model.kv_heads=4"),
        ({"heads": 7}, "model.hidden_size=256 must be a multiple of model.heads=7"),
        ({"init_std": -0.1}, "model.init_std=-0.1 must be 0 or more and finite"),
        ({"norm_eps": float("nan")}, "model.norm_eps=nan must be 0 or more and finite"),
        ({"rope_theta": 0.0}, "model.rope_theta=0.0 must be above 0 and finite"),
    ],
)
def test_refused(values, told):
    with pytest.raises(ValueError) as error:
        DecoderConfig(**values)
    assert str(error.value).startswith(told)


def test_gpt_style():
    config = gpt_style(hidden_size=64, heads=4)
    assert (config.ffn_size, config.norm, config.positions, config.activation) == (256, "layer", "learned", "gelu")
    assert config.bias and config.tied_embeddings
    assert gpt_style(hidden_size=64, heads=4, ffn_size=100).ffn_size == 100
