"""Measures what the device reaches: the copy and the products that all percentages are of."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import record
from bench.gpu.items import Context, Item, Row
from bench.roofline import copy_bandwidth, product_peaks
from gs_kernels.runtime.device import capabilities
from gs_kernels.tuning.gpu_specs import CARDS, Card, card_for

DRY_CARD = CARDS["h200"]  # whose data sheet a dry run takes for measured
SHARE = 0.8  # of it


class Device(Item):
    """Names the GPU, and the described card that stands for it where a ceiling could not be measured."""

    def run(self, context: Context) -> Iterator[Row]:
        gpu = capabilities(torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info()
        about = {"sm": gpu.sm, "sm_count": gpu.sm_count, "free_bytes": free, "total_bytes": total}
        yield {"kind": "device", **about, **sheet_of(card_for(gpu.name, gpu.sm)), **record.environment("cuda")}

    def make_up(self, context: Context) -> Iterator[Row]:
        about = {"sm": 90, "sm_count": DRY_CARD.sm_count, "device_name": "no GPU, times are made up"}
        yield {"kind": "device", **sheet_of(DRY_CARD), **record.environment("cpu"), **about}


def sheet_of(card: Card) -> Row:
    """Returns the name of a card, and what its data sheet says of the ceilings."""
    peaks = {"bfloat16_tflops": "16bit", "int8_tflops": "int8", "fp8_tflops": "fp8"}
    known = {name: card.peaks[kind] for name, kind in peaks.items() if kind in card.peaks}
    return {"card": card.name, "sheet": {"copy_gbps": card.bandwidth, **known}}


class Copy(Item):
    def run(self, context: Context) -> Iterator[Row]:
        yield {"kind": "roofline", "copy_gbps": round(copy_bandwidth(context.device, 0.2), 1)}

    def make_up(self, context: Context) -> Iterator[Row]:
        yield {"kind": "roofline", "copy_gbps": SHARE * DRY_CARD.bandwidth}


class Products(Item):
    def run(self, context: Context) -> Iterator[Row]:
        peaks = product_peaks(context.device, 0.2)
        yield {"kind": "roofline", **{f"{name}_tflops": round(peak, 1) for name, peak in peaks.items()}}

    def make_up(self, context: Context) -> Iterator[Row]:
        found = {name: SHARE * peak for name, peak in sheet_of(DRY_CARD)["sheet"].items() if name != "copy_gbps"}
        yield {"kind": "roofline", **found}


ITEMS = (Device("ceilings/device"), Copy("ceilings/copy"), Products("ceilings/products"))
