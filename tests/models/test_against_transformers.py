"""The decoder's math against an independent one: transformers' Llama and GPT-2 with the same weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megapar import ParallelMesh, vocab_parallel_cross_entropy
from megapar.batch import TokenBatch
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.params import named_specs

VOCAB = 61
TOKENS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))


def randomize(model: nn.Module) -> None:
    """Every parameter, also biases and gains: a zero or a one would hide a missing term."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))


def llama_names(layers: int, value: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under megapar's names."""
    named = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    for i in range(layers):
        for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            named[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
            named[f"blocks.{i}.attention.{ours}.weight"] = f"model.layers.{i}.self_attn.{theirs}.weight"
        for ours, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            named[f"blocks.{i}.mlp.{ours}.weight"] = f"model.layers.{i}.mlp.{theirs}.weight"
    return {ours: value[theirs] for ours, theirs in named.items()}


def gpt2_names(layers: int, value: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 keeps its weights [in, out], and q, k and v in one."""
    found = {"embedding.weight": value["transformer.wte.weight"], "positions.weight": value["transformer.wpe.weight"]}
    for leaf in ("weight", "bias"):
        found[f"norm.{leaf}"] = value[f"transformer.ln_f.{leaf}"]
        for i in range(layers):
            theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
            found[f"{ours}.attention_norm.{leaf}"] = value[f"{theirs}.ln_1.{leaf}"]
            found[f"{ours}.mlp_norm.{leaf}"] = value[f"{theirs}.ln_2.{leaf}"]
            q, k, v = (
                value[f"{theirs}.attn.c_attn.{leaf}"].t().chunk(3) if leaf == "weight" else value[f"{theirs}.attn.c_attn.bias"].chunk(3)
            )
            found |= {f"{ours}.attention.{name}.{leaf}": part for name, part in (("q", q), ("k", k), ("v", v))}
            for name, path in (("attention.out", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                tensor = value[f"{theirs}.{path}.{leaf}"]
                found[f"{ours}.{name}.{leaf}"] = tensor.t() if leaf == "weight" else tensor
    return found


def compare(theirs: nn.Module, config: DecoderConfig, names) -> None:
    """fp64: logits, loss and the gradient of every weight within 1e-5 of the largest, which fp32 angles and eps may cost."""
    randomize(theirs)
    theirs = theirs.double().eval()
    ours = Decoder(config, VOCAB, ParallelMesh.alone(), dtype=torch.float64)
    weights = names(config.layers, {n: p.detach() for n, p in theirs.named_parameters(remove_duplicate=False)})
    with torch.no_grad():
        for _, param, spec in named_specs(ours):
            for piece, view in spec.views(param):
                view.copy_(weights.pop(piece.name))
    assert set(weights) <= {"head.weight"}, "left over"
    expected = theirs(TOKENS[:, :-1]).logits.flatten(0, 1)
    logits = ours(TokenBatch.of(TOKENS[:, :-1]))
    close(logits, expected, "logits")
    targets = TOKENS[:, 1:].flatten()
    loss = vocab_parallel_cross_entropy(logits, targets, tp=None).sum()
    wanted = F.cross_entropy(expected, targets, reduction="sum")
    close(loss, wanted, "loss")
    loss.backward()
    wanted.backward()
    # A key bias has no effect: softmax takes it out, its gradient is rounding. So all share the scale of the largest.
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    gradients = names(config.layers, {n: p.grad for n, p in theirs.named_parameters(remove_duplicate=False)})
    for _, param, spec in named_specs(ours):
        for piece, view in spec.views(param.grad):
            close(view, gradients[piece.name], piece.name, largest)


def close(got: Tensor, expected: Tensor, what: str, scale: float | None = None) -> None:
    error = float((got - expected).detach().abs().max()) / (scale or float(expected.detach().abs().max()))
    assert error <= 1e-5, f"{what}: relative error {error:.1e}"


def test_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 53}
    theirs = LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=VOCAB, rms_norm_eps=1e-3, rope_theta=500.0, tie_word_embeddings=False, attn_implementation="eager")
    )
    config = DecoderConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=53, norm_eps=1e-3, rope_theta=500.0)
    compare(theirs, config, llama_names)


def test_gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 16, "n_inner": 53}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **off, vocab_size=VOCAB, layer_norm_epsilon=1e-5, attn_implementation="eager"))
    compare(theirs, gpt_style(hidden_size=32, layers=2, heads=4, ffn_size=53, max_positions=16), gpt2_names)
