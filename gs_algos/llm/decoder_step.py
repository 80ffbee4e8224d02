"""Decodes one token of a packed Llama, Mistral or Qwen on a CPU without its Python: all layers are one call of C++.

Of a small model's step most of the time is Python and operations on a few hundred numbers. Here the model's own modules
look the token up, make the angles of its position and compute the logits; what lies between is computed from their
tensors, in fp32 (of a bf16 model too: only keys and values, and what goes in and out, are rounded), with the same
formulas. Anything that is not exactly what it seems is left to the model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gs_algos.llm.static_cache import counts_in_python, lengths
from gs_algos.quant.packed.linear import PackedLinear
from gs_kernels.for_layers import DecoderLayer, UnsuitableError, decoder_step_of
from gs_kernels.runtime.dispatch import takes_cpu
from gs_kernels.runtime.torch_private import autocasts, foreach_add_

logger = logging.getLogger(__name__)

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # by module of Transformers
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
UNITS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # of Qwen3
HOOKS = ("_forward_hooks", "_forward_pre_hooks")

DecoderStep = Callable[
    [Tensor, Tensor, int], Tensor
]  # ids and position `[1, 1]`, the latter as a number too, to logits


def decoder_step(model: Any, cache: Any) -> DecoderStep | None:
    """Returns the function of the next token that gives the logits `[1, vocabulary]` behind it; None to call the model.

    Weights must not change while the function is used.

    Args:
        cache: that the prompt was read into, of layers whose part in use Python counts.
    """
    reason = _why_not(model, cache)
    if not reason:
        try:
            return _make(model, cache)
        except UnsuitableError as error:
            reason = str(error)
    logger.debug("each token is decoded by the model's own forward: %s", reason)
    return None


def _why_not(model: Any, cache: Any) -> str:
    if autocasts():
        return "autocast is on"
    kinds = _kinds(model)
    if kinds is None:
        return f"{type(model).__name__} is none of {', '.join(FAMILIES.values())}"
    for layer in model.model.layers:
        for name, kind in kinds.layer.items():
            if type(layer.get_submodule(name)) is not kind:
                return f"{name} is a {type(layer.get_submodule(name)).__name__}"
    hooked = any(getattr(module, name) for module in model.modules() for name in HOOKS)
    if hooked or any("forward" in module.__dict__ for module in model.modules()):
        return "a module has hooks, or a forward of its own"
    config = model.config
    if (type(model.model), type(model.model.norm)) != (kinds.model, kinds.norm):
        return "the network around the layers is another"
    if any(type(layer.mlp.act_fn) is not kinds.silu for layer in model.model.layers):
        return "its activation is not SiLU"
    if getattr(config, "sliding_window", None) is not None:
        return "its attention has a sliding window"
    if len(model.model.layers) != config.num_hidden_layers or model.training:
        return "its settings are others"
    if len(cache.layers) != len(model.model.layers) or not counts_in_python(cache):
        return "keys and values are not in a plain cache"
    for t in (t for layer in cache.layers for t in (layer.keys, layer.values)):
        if t.dtype not in (torch.float32, torch.bfloat16) or t.dtype != model.dtype or not takes_cpu(t):
            return f"keys or values are {t.dtype} on {t.device}"
    return ""


@dataclass(frozen=True)
class Kinds:
    """Holds the classes that a model of a family consists of. layer: those of the modules of each layer, by name."""

    model: type
    norm: type
    silu: type
    layer: dict[str, type]


def _kinds(model: Any) -> Kinds | None:
    for name, prefix in FAMILIES.items():
        code: Any = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
        if code is not None and type(model) is getattr(code, f"{prefix}ForCausalLM"):
            norm = getattr(code, f"{prefix}RMSNorm")
            layer = {"": "DecoderLayer", "self_attn": "Attention", "mlp": "MLP"}
            kinds = {path: getattr(code, prefix + kind) for path, kind in layer.items()}
            kinds |= dict.fromkeys(NORMS + _head_norms(model), norm)
            kinds |= dict.fromkeys((*PROJECTIONS, *UNITS), PackedLinear)
            return Kinds(getattr(code, f"{prefix}Model"), norm, type(code.ACT2FN["silu"]), kinds)
    return None


def _head_norms(model: Any) -> tuple[str, ...]:
    """Returns the names of the norms of queries and keys in each layer of a model."""
    return HEAD_NORMS if hasattr(model.model.layers[0].self_attn, "q_norm") else ()


def _make(model: Any, cache: Any) -> DecoderStep:
    of_heads, layers = _head_norms(model), []
    for layer, cached in zip(model.model.layers, cache.layers, strict=True):
        linears: list[Any] = [layer.get_submodule(name) for name in (*PROJECTIONS, *UNITS)]
        norms = [layer.get_submodule(name).weight for name in NORMS]
        weights = [(m.packed, m.bias) for m in linears]
        inside = [layer.get_submodule(name).weight for name in of_heads]
        layers.append(DecoderLayer(norms[0], norms[1], weights, cached.keys, cached.values, *inside))
    last = model.model.norm
    names = NORMS + of_heads
    eps = {norm.variance_epsilon for layer in model.model.layers for norm in map(layer.get_submodule, names)}
    scaling = {layer.self_attn.scaling for layer in model.model.layers}
    if len(eps) > 1 or scaling != {cache.layers[0].keys.shape[3] ** -0.5}:
        raise UnsuitableError("layers have other constants")
    run = decoder_step_of(layers, last.weight, (eps.pop(), last.variance_epsilon))
    counts = lengths(cache)
    words, angles, head = model.model.embed_tokens, model.model.rotary_emb, model.lm_head

    def step(ids: Tensor, positions: Tensor, position: int) -> Tensor:
        x = words(ids)
        cos, sin = angles(x, positions)
        y = run(x, cos, sin, position)
        foreach_add_(counts, 1)
        for cached in cache.layers:
            cached.used += 1
        logits: Tensor = head(y)[:, -1]
        return logits

    return step
