"""`golden-stick latency`: times the layers of a network, as they are and in our packed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gs_algos.analysis.latency import layer_times
from gs_algos.analysis.latency_table import latency_table
from gs_algos.core.batches import on_device, resized
from gs_algos.core.table import Table
from gs_algos.llm.load import load_language_model
from gs_algos.quant.packed.module import Packed

NONE = "none"
TOKENS = (1, 128)  # of a language model's inputs, if nobody says how many


def run_latency(
    net: nn.Module, example: Tensor, choices: str, batch: int | None, seconds: float, device: torch.device, out: Path
) -> Table:
    """Returns the latency table of a float network; of a packed one, or without choices, where its milliseconds go."""
    net, inputs = net.to(device).eval(), on_device(example, device)
    if choices == NONE or any(isinstance(module, Packed) for module in net.modules()):
        return layer_times(net, inputs if batch is None else resized(inputs, batch), seconds=seconds).table()
    given = tuple(choice.strip() for choice in choices.split(",") if choice.strip())
    return latency_table(net, inputs, given, batch=batch, seconds=seconds, path=out).table()


def is_language_model(model: str) -> bool:
    """Says whether a text names a folder, or a GGUF file."""
    return Path(model).is_dir() or (model.endswith(".gguf") and Path(model).is_file())


def language_model(model: str, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """Returns a language model, and random tokens of this shape.

    Raises:
        ValueError: if the shape is not that of tokens, or as `load_language_model`.
    """
    if len(shape) != 2:
        raise ValueError(f"{model}: --input-shape of a language model must be like 1,128, got {shape}")
    net: Any = load_language_model(Path(model))[0]
    generator = torch.Generator().manual_seed(0)
    return net, torch.randint(net.config.get_text_config().vocab_size, shape, generator=generator)
