"""Measures what compression did to a network: its size, its work, its time, and how its outputs changed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from gs_algos.analysis.operations import count_operations
from gs_algos.analysis.outputs import are_logits, class_rows, kept_samples, kl_divergence, output_of
from gs_algos.analysis.quality import Quality, QualitySum, labels_of, quality_of
from gs_algos.core.algorithm import Inputs, InputsError, evaluating, history, run, split_inputs
from gs_algos.core.batches import InputsOf, checked_batches, device_of, on_device, resized, samples_of
from gs_algos.core.checkpoint import save, unique_tensors
from gs_algos.core.memory import nbytes_of, peak_bytes
from gs_algos.core.network import network_of, ordinary_tensors, without_autocast
from gs_algos.core.progress import progress
from gs_algos.core.table import Table
from gs_algos.core.timing import Timing, time_in_turns
from gs_algos.quant.integer.quantized_tensor import dequantized
from gs_algos.quant.packed.module import Packed
from gs_kernels.runtime.torch_private import tree_leaves

WHO = "effect"
PART = 2**24  # numbers of outputs that are compared at a time: a vocabulary of 100,000 is large


@dataclass(frozen=True)
class NetworkFacts:
    """Holds what one network takes.

    Args:
        nbytes: of its parameters and buffers as loaded, a tied or shared one once.
        disk_bytes: of the files that it is saved in; None if it cannot be.
        numbers: its weights: elements of all parameters, packed ones counted by their shape.
        macs: multiply-adds of one sample, see `count_operations`.
        bops: sum of macs x bits of weight x bits of activation.
        ms: batch -> time of a forward.
        peak_bytes: batch -> what a forward takes beside the network, at its peak.
        quality: None without labels.
    """

    nbytes: int
    disk_bytes: int | None
    numbers: int
    macs: int
    bops: int
    ms: Mapping[int, Timing]
    peak_bytes: Mapping[int, int]
    quality: Quality | None


@dataclass(frozen=True)
class Effect:
    """Holds a network before and after compression, and how far the outputs are apart.

    Args:
        samples: rows of outputs that were compared: images, or tokens.
        differing: predictions that differ; None if the outputs are no logits.
        divergence: mean KL(before || after) in nats, from fp32 logits; None if the outputs are no logits.
        error: `rms(after - before) / rms(before)` of the outputs; inf if after gives NaN or Inf.
        notes: what could not be measured, and why.
    """

    before: NetworkFacts
    after: NetworkFacts
    samples: int
    differing: int | None
    divergence: float | None
    error: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """Returns a table: a row for each fact, columns before, after, and after as a share of before."""
        a, b = self.before, self.after
        rows = [_row(words, getattr(a, key), getattr(b, key)) for key, words in _COUNTS.items()]
        rows += [_row(f"ms, batch {n}", a.ms[n].p50, b.ms[n].p50) for n in a.ms]
        rows += [_row(f"peak bytes, batch {n}", a.peak_bytes[n], b.peak_bytes[n]) for n in a.peak_bytes]
        if a.quality is not None and b.quality is not None:
            rows.append((a.quality.name, str(a.quality), str(b.quality), ""))
        compared = [f"outputs differ by {100 * self.error:.2g} % (relative RMS of {self.samples:,} rows)"]
        if self.differing is not None and self.divergence is not None:
            compared.append(
                f"{self.differing:,} of {self.samples:,} predictions differ, mean KL {self.divergence:.2g} nats"
            )
        return Table.of(("", "before", "after", "share"), rows, below=(*compared, *self.notes))


_COUNTS = {
    "nbytes": "bytes loaded",
    "disk_bytes": "bytes on disk",
    "numbers": "numbers",
    "macs": "MACs",
    "bops": "BOPs",
}


def _row(words: str, a: float | None, b: float | None) -> tuple[str, str, str, str]:
    shown = ["" if n is None else f"{n:,}" if isinstance(n, int) else f"{n:.3g}" for n in (a, b)]
    return words, *shown, f"{100 * b / a:.1f} %" if a and b is not None else ""  # type: ignore[return-value]


def effect(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs,
    data: Iterable[Any] = (),
    *,
    batches: Sequence[int] = (),
    seconds: float = 1.0,
) -> Effect:
    """Compares a network with what it was compressed to. Both are left as they were.

    Times are taken in turns, before after before after ..., on the same inputs. A sample is a row of outputs: an image,
    or a token; tokens that `attention_mask` leaves out do not count.

    Args:
        before, after: networks that take the same inputs and give outputs of the same shapes, in any mode; they run in
            eval mode. The first float tensor of their outputs is compared, or `.logits`.
        inputs: of one call; what runs when work, time and memory are measured.
        data: batches: inputs alone, or `(inputs, labels)`, `{"input_ids": ..}`. Integer labels `[B]` give the accuracy;
            a language model, `input_ids [B, T]` to `logits [B, T, vocabulary]`, its perplexity. Default: `[inputs]`.
        batches: samples of the forwards that are timed; default: 1, and those of `inputs`.
        seconds: for how long a forward of each size is timed, of each network.

    Raises:
        ValueError: if there are no inputs, they do not run, the outputs have different shapes, or those of `before` are
            not finite.
        TypeError: if a network is no module, or `data` is nothing to iterate over.
    """
    networks = {"before": network_of(before, WHO), "after": network_of(after, WHO)}
    _refuse_arguments(networks, inputs, batches, seconds)
    notes: list[str] = []
    with ordinary_tensors(), without_autocast():
        inputs = on_device(inputs, device_of(networks["before"]))
        compared = _compare(networks, inputs, data, notes)
        sizes = sorted(set(batches or (1, samples_of(inputs))))
        ms, peaks = _costs({"before": before, "after": after}, inputs, sizes, seconds, notes)
        before_facts, after_facts = (
            NetworkFacts(
                nbytes_of(net),
                _disk_bytes(name, net, notes),
                _numbers(net),
                *_operations(net, inputs),
                ms[name],
                peaks[name],
                compared.quality[name],
            )
            for name, net in networks.items()
        )
    return compared.effect(before_facts, after_facts, notes)


def _refuse_arguments(
    networks: Mapping[str, nn.Module], inputs: Inputs, batches: Sequence[int], seconds: float
) -> None:
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise TypeError(
            f"{WHO}: inputs must be those of one call, got {type(inputs).__name__}; give a tensor or a dict"
        )
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise ValueError(f"{WHO}: inputs must hold a tensor, got none; give those of one call")
    if samples_of(inputs) < 1:
        raise ValueError(f"{WHO}: inputs must hold one sample at least, got none")
    wrong = [n for n in batches if type(n) is not int or n < 1]
    if wrong:
        raise ValueError(f"{WHO}: batches must be whole numbers from 1 on, got {wrong[0]!r}")
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{WHO}: seconds must be 0 or more, got {seconds}")
    devices = {name: device_of(net) for name, net in networks.items()}
    if None not in devices.values() and devices["before"] != devices["after"]:
        both = " and ".join(map(str, devices.values()))
        raise ValueError(f"{WHO}: before and after must be on one device, got {both}; move one")


def _sample_rows(outputs: Tensor) -> Tensor:
    """Views outputs as `[samples, values]`."""
    return outputs.flatten(1) if outputs.dim() > 1 else outputs.reshape(-1, 1)


class _Compared:
    """Sums what outputs of both networks say, batch by batch."""

    def __init__(self) -> None:
        self.samples = self.differing = self.not_finite = 0
        self.divergence = self.squares = self.differences = 0.0
        self.logits = True
        self.sums: dict[str, QualitySum] = {}
        self.quality: dict[str, Quality | None] = {"before": None, "after": None}

    def add(self, before: Tensor, after: Tensor, batch: Inputs) -> None:
        """Adds the outputs of one batch, those of `before` finite."""
        self.logits = self.logits and are_logits(before)
        rows = (class_rows(before), class_rows(after)) if self.logits else (_sample_rows(before), _sample_rows(after))
        kept = torch.ones(len(rows[0]), dtype=torch.bool, device=before.device)
        if self.logits and before.dim() < 4:
            kept = kept_samples(before, batch).flatten()
        some = max(1, PART // max(1, rows[0].shape[1]))
        for p, q, use in zip(*(t.split(some) for t in (*rows, kept)), strict=True):
            self._add_rows(p[use].float(), q[use].float())

    def _add_rows(self, before: Tensor, after: Tensor) -> None:
        finite = after.isfinite().all(-1)
        if self.logits:
            self.differing += int(((before.argmax(-1) != after.argmax(-1)) | ~finite).sum())
            divergence = kl_divergence(before.log_softmax(-1), after.log_softmax(-1))
            self.divergence += float(divergence.sum(dtype=torch.float64))
        self.samples += len(before)
        self.not_finite += int((~finite).sum())
        self.squares += float(before.double().square().sum())
        self.differences += float((after.double() - before.double()).square().sum())

    def effect(self, before: NetworkFacts, after: NetworkFacts, notes: Sequence[str]) -> Effect:
        """Returns what the sums and the facts of both networks say."""
        broken = self.not_finite > 0
        error = (self.differences / (self.squares or 1.0)) ** 0.5
        divergence = self.divergence / max(1, self.samples)
        return Effect(
            before,
            after,
            samples=self.samples,
            differing=self.differing if self.logits else None,
            divergence=None if not self.logits else float("inf") if broken else divergence,
            error=float("inf") if broken else error,
            notes=tuple(notes),
        )


def _compare(networks: Mapping[str, nn.Module], inputs: Inputs, data: Iterable[Any], notes: list[str]) -> _Compared:
    """Runs both networks on each batch, once."""
    found = _Compared()
    taken = InputsOf(WHO, networks["before"], inputs)
    empty = True
    with evaluating(networks["before"]), evaluating(networks["after"]):
        for batch in progress(checked_batches(WHO, data), "comparing outputs"):
            empty = False
            given = on_device(taken(batch), device_of(networks["before"]))
            _compare_batch(networks, given, labels_of(batch, taken(batch)), found)
        if empty:
            notes.append("no data was given: outputs are those of the inputs alone, and quality is not measured")
            _compare_batch(networks, inputs, None, found)
    for name, sums in found.sums.items():
        found.quality[name] = sums.quality()
    if not empty and not found.sums:
        notes.append("data held no labels, integers [B] beside the inputs: quality is not measured")
    if found.not_finite:
        notes.append(f"after gives NaN or Inf in {found.not_finite:,} of {found.samples:,} rows of its outputs")
    return found


def _compare_batch(networks: Mapping[str, nn.Module], batch: Inputs, labels: Any, found: _Compared) -> None:
    outputs = {name: _output(name, net, batch) for name, net in networks.items()}
    before, after = outputs.values()
    if before.shape != after.shape:
        raise ValueError(
            f"{WHO}: before and after must give outputs of one shape, got {list(before.shape)} and {list(after.shape)}"
        )
    if not bool(before.isfinite().all()):
        raise ValueError(f"{WHO}: the outputs of before must be finite, got NaN or Inf")
    found.add(before, after, batch)
    for name, output in outputs.items():
        quality = quality_of(output, batch, labels, _predicts_next(networks[name]), WHO)
        if quality is not None:
            found.sums[name] = found.sums.get(name, QualitySum(quality.name)).plus(quality)


def _predicts_next(net: Any) -> bool:
    """Says whether a network of tokens predicts the next one; those of Transformers know, others are taken to."""
    encodes = getattr(getattr(net, "config", None), "is_encoder_decoder", False)
    return not encodes and (not hasattr(net, "can_generate") or bool(net.can_generate()))


def _output(name: str, net: nn.Module, batch: Inputs) -> Tensor:
    try:
        output = output_of(run(net, batch, WHO))
    except InputsError as error:
        raise InputsError(f"{WHO}: {name}", error.text) from error.__cause__
    if output is None:
        raise ValueError(f"{WHO}: {name} must return a float tensor, got none in its outputs")
    return dequantized(output)  # type: ignore[no-any-return]


def _costs(
    networks: Mapping[str, nn.Module], inputs: Inputs, sizes: Sequence[int], seconds: float, notes: list[str]
) -> tuple[dict[str, dict[int, Timing]], dict[str, dict[int, int]]]:
    """Measures time and peak memory of forwards with so many samples; leaves out a size that a network refuses."""
    ms: dict[str, dict[int, Timing]] = {name: {} for name in networks}
    peaks: dict[str, dict[int, int]] = {name: {} for name in networks}
    device = device_of(networks["before"]) or torch.device("cpu")
    with evaluating(networks["before"]), evaluating(networks["after"]):
        for size in sizes:
            batch = resized(inputs, size)
            args, kwargs = split_inputs(batch)
            try:
                for name, net in networks.items():
                    run(net, batch, name)
            except InputsError as error:
                notes.append(f"a batch of {size} was not timed: {error}")
                continue
            calls: list[Callable[[], Any]] = [partial(net, *args, **kwargs) for net in networks.values()]
            for name, call, timing in zip(networks, calls, time_in_turns(calls, device, seconds), strict=True):
                ms[name][size], peaks[name][size] = timing, peak_bytes(device, call)
    return ms, peaks


def _operations(net: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """Returns (multiply-adds, bit operations) of one sample."""
    try:
        found, samples = count_operations(net, resized(inputs, 1), WHO), 1
    except InputsError:  # a network of one batch size
        found, samples = count_operations(net, inputs, WHO), samples_of(inputs)
    return found.macs // samples, found.bops // samples


def _numbers(net: nn.Module) -> int:
    """Counts weights: elements of parameters once, packed ones by their shape, with their biases."""
    packed = [m for m in net.modules() if isinstance(m, Packed)]
    held = sum(m.shape[0] * m.shape[1] for m in packed if not m.tied)
    biases = [m._buffers.get("bias") for m in packed]
    return sum(p.numel() for p in net.parameters()) + held + sum(b.numel() for b in biases if b is not None)


def _disk_bytes(name: str, net: nn.Module, notes: list[str]) -> int | None:
    """Returns the bytes of the files of `gs_algos.save`; without a history, of one file of tensors."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            if history(net):
                save(net, folder)
            else:
                Path(folder, "model.safetensors").write_bytes(to_bytes(unique_tensors(net)[0]))
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        notes.append(f"{name} was not saved: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return None
