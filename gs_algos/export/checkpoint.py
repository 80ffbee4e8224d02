"""A language model on disk to a packed one on disk, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gs_algos.core.progress import progress as progress_bar
from gs_algos.export.folder import Folder, ShardWriter, opened, read_folder, whole_folder
from gs_algos.export.language import is_gguf, load_gguf
from gs_algos.export.packed_config import to_config
from gs_algos.export.skeleton import skeleton
from gs_algos.ptq.sites import Site, WeightRule, check_schemes, weight_sites
from gs_algos.ptq.weights import settings_of, site_row
from gs_algos.quant.packed import PackedFormat
from gs_algos.quant.packing import in_rows, matrix_of
from gs_algos.quant.rounding import round_to_nearest
from gs_algos.quant.scheme import Scheme
from gs_kernels.pack.state import to_tensors

WHO = "quantize_checkpoint"


@dataclass(frozen=True)
class Written:
    """What `quantize_checkpoint` wrote. before, after: bytes of the tensors."""

    folder: Path
    packed: int
    kept: int
    before: int
    after: int


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    weights: str | Scheme = "int4@group:128",
    *,
    embeddings: str | Scheme | None = None,
    rules: Sequence[WeightRule] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    shard_bytes: int = 2**31,
) -> Written:
    """Packs a Transformers folder or a GGUF file into the new folder `target`, as `quantize_weights` packs a model.

    A Transformers folder is read tensor by tensor, so it may be larger than memory; a GGUF file is loaded whole. The
    target appears at the end, complete; a run that is stopped leaves nothing that could be mistaken for it.

    Args:
        weights, embeddings, rules, device, progress: as in `quantize_weights`.
        dtype: that what stays float is cast to, and that config.json asks for; None keeps both as they are.
        shard_bytes: largest tensor file, and what is held of the result in memory.

    Raises:
        ValueError: if the source is not a float model in safetensors or GGUF, the target is not empty, or as
            `quantize_weights`.
    """
    path = Path(source)
    gguf = is_gguf(path)
    check_schemes(weights, embeddings, rules)
    with whole_folder(target, WHO) as out:
        origin = _Gguf(path) if gguf else _Transformers(read_folder(path, WHO))
        sites = weight_sites(origin.model, weights, embeddings, rules)
        stored = _stored_names(sites, origin.names, path)
        writer = ShardWriter(out, shard_bytes)
        formats: dict[str, PackedFormat] = {}
        before = 0
        tensors = origin.tensors(progress)
        for name, tensor in tensors:
            before += tensor.numel() * tensor.element_size()
            site = stored.get(name)
            if site is None or site.scheme is None:
                writer.add(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
            elif site.names[0] not in formats:
                formats[site.names[0]] = _pack(writer, site, tensor, device)
        writer.close()
        rows = [site_row(site, formats.get(site.names[0])) for site in sites]
        packed = to_config(rows, settings_of(weights, embeddings, rules), writer.hashes)
        config = {**origin.config, "quantization_config": packed}
        if dtype is not None:
            config = {**config, "dtype": str(dtype).removeprefix("torch.")}
            config.pop("torch_dtype", None)
        (out / "config.json").write_text(json.dumps(config, indent=2))
        origin.write_companions(out)
    return Written(Path(target), len(formats), len(sites) - len(formats), before, writer.nbytes)


class _Transformers:
    """A Transformers folder as a source: its model without data, its tensors one at a time."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.config, self.names = folder, folder.config, set(folder.tensors)
        if self.config.get("quantization_config") is not None:
            method = self.config["quantization_config"].get("quant_method")
            raise ValueError(f"{WHO}: {folder.path} must be a float model, got one with quant_method {method!r}")
        self.model = skeleton(folder.path, WHO)

    def tensors(self, progress: bool) -> Iterator[tuple[str, Tensor]]:
        items = list(self.folder.tensors.items())
        current: Path | None = None
        with ExitStack() as stack:
            for name, file in progress_bar(items, "packing") if progress else items:
                if file != current:
                    stack.close()
                    data, current = stack.enter_context(opened(file, WHO)), file
                yield name, data.get_tensor(name)

    def write_companions(self, out: Path) -> None:
        for file in self.folder.companions():
            shutil.copyfile(file, out / file.name)


class _Gguf:
    """A GGUF file as a source."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer = load_gguf(path)
        self.state = self.model.state_dict()
        self.names = set(self.state)
        config = self.model.config.to_diff_dict()
        config.pop("quantization_config", None)
        self.config = {**config, "architectures": [type(self.model).__name__], "dtype": "float32"}

    def tensors(self, progress: bool) -> Iterator[tuple[str, Tensor]]:
        tied = self.model.all_tied_weights_keys
        items = [(name, tensor) for name, tensor in self.state.items() if name not in tied]
        yield from progress_bar(items, "packing") if progress else items

    def write_companions(self, out: Path) -> None:
        self.tokenizer.save_pretrained(out)
        self.model.generation_config.save_pretrained(out)


def _stored_names(sites: list[Site], names: set[str], path: Path) -> dict[str, Site]:
    """Tensor name -> the site whose weight it is.

    Raises:
        ValueError: if the weight of a layer to pack is not among the names.
    """
    lost = [site for site in sites if site.scheme is not None and not any(f"{n}.weight" in names for n in site.names)]
    if lost:
        raise ValueError(
            f"{WHO}: {path} must hold {lost[0].names[0]}.weight, got no tensor of that name ({len(lost)} such layers); "
            "load the model with transformers and save_pretrained it, which renames tensors to those of the model"
        )
    return {f"{name}.weight": site for site in sites for name in site.names}


def _pack(writer: ShardWriter, site: Site, tensor: Tensor, device: torch.device | str | None) -> PackedFormat:
    assert site.scheme is not None
    shape = tuple(site.layer.weight.shape)  # type: ignore[union-attr,arg-type]
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{WHO}: {site.names[0]}.weight must be {list(shape)} as config.json says, got {list(tensor.shape)}"
        )
    try:
        rows = matrix_of(site.layer, tensor if device is None else tensor.to(device))
        packed = in_rows(site.layer, round_to_nearest(rows, site.scheme))
    except ValueError as error:
        raise ValueError(f"{error} in {site.names[0]}.weight") from error
    for part, value in to_tensors(packed)[0].items():
        writer.add(f"{site.names[0]}.{part}", value)
    return PackedFormat.of(packed)
