"""The CPU benchmark of convolutions: a row per shape, with the times of whatever agrees with the float convolution."""

import pytest
import torch

from bench import convolutions
from bench.shapes import NETWORKS, Layer
from gs_kernels.runtime.dispatch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the benchmarks refuse to run, nothing to test")
LAYERS = (Layer(3, 8, 10, 3, 2), Layer(8, 8, 5, 3, 1, 8))


def test_a_shape_is_a_row_with_the_times_of_every_provider(monkeypatch, capsys):
    rows = []
    monkeypatch.setattr(convolutions, "NETWORKS", {"net": LAYERS})
    monkeypatch.setattr(convolutions.record, "append", lambda row, kind, **where: rows.append((kind, row)))
    assert convolutions.main(["--network", "net", "--batch", "1", "2", "--seconds", "0.001"]) == 0
    assert [(kind, row["batch"], row["layer"]) for kind, row in rows] == [
        ("convolution", batch, layer.__dict__) for batch in (1, 2) for layer in LAYERS
    ]
    assert all(row["ms"].keys() == {"float32", "bfloat16", "w4", "w4 qconv2d", "w8a8"} for _, row in rows)
    assert all(ms > 0 for _, row in rows for ms in row["ms"].values())


def test_a_provider_that_computes_something_else_is_not_timed(monkeypatch):
    calls, tolerance = convolutions.providers(LAYERS[0], 1)
    wrong = {**calls, "w4": lambda: torch.zeros(1, 8, 5, 5)}
    monkeypatch.setattr(convolutions, "providers", lambda layer, batch: (wrong, tolerance))
    with pytest.raises(RuntimeError, match="w4 must give the float result, got 1 for Layer"):
        dict(convolutions.measure(LAYERS[0], 1, 0.001))


def test_a_limit_starts_nothing_new_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(convolutions.record, "append", lambda row, kind, **where: None)
    assert convolutions.main(["--limit", "0"]) == 1
    assert "--limit 0 s reached before resnet18 batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("name, model, count", [("resnet18", "resnet18", 11), ("mobilenet_v2", "mobilenetv2", 30)])
def test_benchmarks_hold_every_convolution_of_the_networks_they_name(name, model, count):
    from gs_algos.demo.models import build

    with torch.device("meta"):
        net, x = build(model, in_channels=3, num_classes=1000, image_size=224).eval(), torch.empty(1, 3, 224, 224)
    seen = set()

    def note(module, args, output):
        about = (module.in_channels, module.out_channels, args[0].shape[2], module.kernel_size[0])
        seen.add((*about, module.stride[0], module.groups))

    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.padding[0] == module.kernel_size[0] // 2
            module.register_forward_hook(note)
    net(x)
    assert seen == {(s.c, s.o, s.size, s.kernel, s.stride, s.groups) for s in NETWORKS[name]}
    assert len(seen) == len(NETWORKS[name]) == count
