"""Whole checkpoints that compressed-tensors itself wrote, imported: the weights that it decompresses, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gs_algos.llm.interchange import import_language_model
from gs_algos.llm.load import load_language_model
from gs_algos.quant.packed.module import Packed
from tests.nets.language_models import tiny_llama, tiny_tokenizer


def compressed(folder: Path, bits: int, strategy: str, group_size: int | None, symmetric: bool) -> dict[str, Any]:
    """Writes a tiny Llama as the library compresses it; its decompressed weights by layer."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as apply
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=bits, strategy=strategy, group_size=group_size, symmetric=symmetric, type="int")
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    model = tiny_llama(False)
    apply(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized"))
    layers = [name for name, layer in model.named_modules() if hasattr(layer, "weight_scale")]
    for layer in map(model.get_submodule, layers):
        grouped = layer.weight.detach().view(layer.weight.shape[0], -1, group_size or layer.weight.shape[1])
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        layer.weight_scale.data.copy_(scale)
        layer.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tiny_tokenizer().save_pretrained(folder)
    compressor.decompress_model(model)
    return {name: model.get_submodule(name).weight.detach() for name in layers}


@pytest.mark.parametrize(
    ("bits", "strategy", "group_size", "symmetric"),
    [(4, "group", 32, True), (4, "group", 32, False), (8, "channel", None, True), (2, "group", 16, False)],
)
def test_what_compressed_tensors_wrote_is_imported_as_it_is(
    bits: int, strategy: str, group_size: int | None, symmetric: bool, tmp_path: Path
):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; it is in the dev extra")
    want = compressed(tmp_path / "theirs", bits, strategy, group_size, symmetric)
    assert import_language_model(tmp_path / "theirs", tmp_path / "ours").layers == len(want) == 14
    model, _ = load_language_model(tmp_path / "ours")
    got = {name: module.weight for name, module in model.named_modules() if isinstance(module, Packed)}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name].to(want[name].dtype), want[name]) for name in want)
