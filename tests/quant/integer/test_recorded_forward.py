"""Converted networks that run as they were recorded: the same bits, and everything that has to see a forward does."""

from __future__ import annotations

import copy
import io
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gs_algos import SLB, SimQAT
from gs_algos.demo import models
from gs_algos.quant.integer import recorded_forward
from gs_algos.quant.integer.layers import QuantizedConv
from gs_algos.quant.integer.prepared_call import PREPARED
from gs_algos.quant.integer.recorded_forward import RecordsForward
from gs_algos.quant.packed.linear import DynamicPackedLinear, PackedLinear
from gs_kernels.program.cpu import kernels
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import same_bits

pytestmark = pytest.mark.skipif(INTERPRET or kernels() is None, reason="nothing is recorded where no C++ runs")


class Net(nn.Module):
    """A block with all kinds of calls: kernels, operations between them, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.each, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.pool, self.relu, self.fc = nn.MaxPool2d(2), nn.ReLU6(), nn.Linear(16, 5)
        self.adds, self.steps = True, [1]

    def body(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.point(F.relu(self.each(x)))
        return self.pool(self.relu(x + y if self.adds else y))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for _ in self.steps:
            y = F.hardswish(y)
        return self.fc(y.mean((2, 3)))


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def converted(net: nn.Module, *size: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    algo = SimQAT(**{"weight": "int8@channel", "act": "int8@tensor:ema", **options})
    net = algo.apply(net.eval(), drawn(*size))
    net.train()(drawn(*size))
    return algo.convert(net.eval())


@pytest.fixture
def net() -> nn.Module:
    return converted(Net(), 2, 3, 9, 9)


def plain(net: nn.Module, x: Tensor) -> Tensor:
    """What the network gives that nothing was recorded of."""
    return nn.Module.__call__(copy.deepcopy(net), x)


def is_recorded(net: nn.Module, x: Tensor) -> bool:
    net(x), net(x)
    return any(form is not None and form.run is not None for form in net.__dict__[PREPARED].values())


def runs_layers(net: nn.Module, x: Tensor) -> bool:
    """Says whether a forward calls the network's layers one by one."""
    kinds, seen = {type(m) for m in net.modules() if isinstance(m, QuantizedConv)}, []
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            own = kind.forward
            patch.setattr(kind, "forward", lambda self, x, own=own: seen.append(self) or own(self, x))
        net(x)
    return bool(seen)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, size, last",
    [("resnet20", 12, False), ("resnet20", 12, True), ("mobilenetv2", 12, True), ("resnet18", 33, False)],
)
def test_known_networks_give_the_same_bits_and_strides(name: str, size: int, last: bool):
    form = torch.channels_last if last else torch.contiguous_format
    built = models.build(name, in_channels=3, num_classes=10, image_size=size)
    net = converted(built.to(memory_format=form), 2, 3, size, size)
    for batch in (2, 1):
        x = drawn(batch, 3, size, size, seed=1).contiguous(memory_format=form)
        assert is_recorded(net, x) and not runs_layers(net, x)
        other = drawn(batch, 3, size, size, seed=2).contiguous(memory_format=form)
        got, want = net(other), plain(net, other)
        assert same_bits(got, want) and got.stride() == want.stride() and type(got) is Tensor


class Gated(nn.Module):
    """A block of MobileNetV3 and EfficientNet: a squeezed image makes a gate, which multiplies the image."""

    def __init__(self, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.wide, self.each = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.down, self.up, self.narrow = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1), nn.Conv2d(24, 3, 1)
        self.activation, self.gate, self.pool, self.linear = (
            activation(),
            gate(),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(3, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.each(self.activation(self.wide(x))))
        y = y * self.gate(self.up(F.relu(self.down(self.pool(y)))))
        return self.activation(self.linear((x + self.narrow(y)).mean((2, 3))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "kinds", [(nn.SiLU, nn.Sigmoid), (nn.Hardswish, nn.Hardsigmoid), (nn.GELU, nn.Tanh), (nn.LeakyReLU, nn.Sigmoid)]
)
def test_networks_of_gates_are_recorded_with_every_activation(kinds: tuple[type[nn.Module], ...], mode: Any):
    net, x = converted(Gated(*kinds), 2, 3, 9, 9), drawn(2, 3, 9, 9, seed=1)
    with mode():
        assert is_recorded(net, x) and not runs_layers(net, x)
        assert same_bits(net(3 * x), plain(net, 3 * x))


class Signals(nn.Module):
    """Convolutions in one dimension with an add, a pool, groups, a stride and padding to the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(2, 16, 9, 4, 4, bias=False), nn.BatchNorm1d(16)
        self.same, self.each = (
            nn.Conv1d(16, 16, 3, padding="same"),
            nn.Conv1d(16, 16, 5, padding=4, dilation=2, groups=16),
        )
        self.pool, self.last, self.linear = nn.MaxPool1d(2), nn.Conv1d(16, 7, 1), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.pool(F.relu(x + self.each(F.relu(self.same(x)))))
        return self.linear(F.silu(self.last(x)).mean(2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"act": None}, {"weight": "int4@channel"}])
def test_networks_of_signals_are_recorded(options: dict[str, Any], mode: Any):
    net, x = converted(Signals(), 2, 2, 70, **options), drawn(3, 2, 70, seed=1)
    alone = copy.deepcopy(net)
    with mode():
        assert is_recorded(net, x) and not runs_layers(net, x)
        assert same_bits(net(3 * x), nn.Module.__call__(alone, 3 * x))
        want = net(x)
    torch.testing.assert_close(net(x.requires_grad_()), want.clone())  # layer by layer, on floats


@torch.no_grad()
def test_a_linear_that_reads_packed_codes_is_recorded():
    body = nn.Sequential(nn.Conv2d(3, 1024, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 1024), nn.ReLU())
    net, x = converted(body, 1, 3, 1, 1, weight="int4@channel"), drawn(1, 3, 1, 1, seed=1)
    assert is_recorded(net, x) and not runs_layers(net, x)
    assert same_bits(net(3 * x), plain(net, 3 * x))


@torch.no_grad()
@pytest.mark.parametrize("act", ["uint8@tensor:ema", "int4@tensor:ema", "int8@tensor:ema:sym", "int8@tensor:lsq"])
def test_every_kind_of_grid_gives_the_same_bits(act: str):
    net, x = converted(Net(), 2, 3, 9, 9, act=act), drawn(2, 3, 9, 9, seed=1)
    assert is_recorded(net, x) and not runs_layers(net, x)
    assert same_bits(net(3 * x), plain(net, 3 * x))
    want = plain(net, x)
    with torch.inference_mode():
        assert same_bits(net(x), want) and net(x).is_inference()


class PartlyFloat(nn.Module):
    """Convolutions that batch norms follow, in a residual block, with activations that write in place or do not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, 16, 3, padding=1, bias=False) for n in (3, 16, 16))
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.GroupNorm(4, 16)])
        self.relu, self.norm, self.fc = nn.ReLU(inplace), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norms[0](self.convs[0](x)))
        y = self.relu(self.norms[1](self.convs[1](x)))
        x = self.relu(self.norms[2](self.convs[2](y)) + x)
        x += 1
        return self.fc(self.norm(x.mean((2, 3))))


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("left", [(0,), (1,), (2,), (0, 2), ()])
def test_layers_left_in_float_are_part_of_a_recording(inplace: bool, left: tuple[int, ...]):
    rules: Any = [*((f"convs.{i}", None) for i in left), *([] if left else [("fc", None)])]
    net, x = converted(PartlyFloat(inplace), 2, 3, 9, 9, rules=rules), drawn(2, 3, 9, 9, seed=1)
    assert is_recorded(net, x) and not runs_layers(net, x)
    assert same_bits(net(3 * x), plain(net, 3 * x))
    floating: Any = net.fc if not left else net.convs[left[0]]
    floating.weight.mul_(2)  # sees that it changed
    assert same_bits(net(x), plain(net, x))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_a_network_with_any_of_its_layers_in_float_is_recorded(seed: int):
    draw = random.Random(seed)
    built = models.build("resnet20", in_channels=3, num_classes=10, image_size=12).to(memory_format=torch.channels_last)
    left = [name for name, m in built.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and draw.random() < 0.3]
    net = converted(built, 2, 3, 12, 12, rules=[(name, None) for name in left])
    x = drawn(2, 3, 12, 12, seed=1).contiguous(memory_format=torch.channels_last)
    assert left and is_recorded(net, x) and not runs_layers(net, x)
    assert same_bits(net(3 * x), plain(net, 3 * x))


@torch.no_grad()
@pytest.mark.parametrize("algo", [SimQAT(weight="int4@channel", act=None), SLB(weight="1bit@channel", total_steps=1)])
def test_networks_of_weights_alone_are_recorded(algo: Any):
    x = drawn(2, 3, 9, 9, seed=1)
    net = algo.apply(PartlyFloat(True).eval(), x)
    net.train()(x)
    algo.step()
    net = algo.convert(net.eval())
    assert is_recorded(net, x) and not runs_layers(net, x)
    assert same_bits(net(3 * x), plain(net, 3 * x))


@torch.no_grad()
@pytest.mark.parametrize("kind", [PackedLinear, DynamicPackedLinear])
def test_packed_layers_with_float_inputs_are_part_of_a_recording(kind: type[PackedLinear]):
    rules: Any = [("convs.1", {"weight": "int4@channel", "act": None}), ("fc", None)]
    net, x = converted(PartlyFloat(False), 2, 3, 9, 9, rules=rules), drawn(2, 3, 9, 9, seed=1)
    net.fc = kind.from_linear(net.fc, "int4@channel")
    assert is_recorded(net, x)
    assert same_bits(net(3 * x), plain(net, 3 * x))


@torch.no_grad()
def test_a_batch_norm_that_learns_is_not_recorded():
    net, x = converted(PartlyFloat(True), 2, 3, 9, 9, rules=[("convs.1", None)]), drawn(2, 3, 9, 9, seed=1)
    net.norms[1].train().num_batches_tracked = None  # so that only its statistics tell
    assert not is_recorded(net, x)


def test_gradients_tracers_and_other_forms_run_the_layers(net: nn.Module):
    x = drawn(2, 3, 9, 9, seed=1)
    assert is_recorded(net, x) and not runs_layers(net, x)
    assert runs_layers(net, x.requires_grad_()) and net(x).requires_grad
    x = x.detach()
    assert runs_layers(net, drawn(1, 3, 7, 7)) and runs_layers(net, x.bfloat16())
    assert same_bits(torch.jit.trace(net, x)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_layers(net, x)
    with pytest.raises(TypeError):
        net(x, x)


@torch.no_grad()
@pytest.mark.parametrize("site", ["", "stem", "relu", "point", "fc"])
def test_hooks_are_called_and_change_the_result(net: nn.Module, site: str):
    x, seen, calls = drawn(2, 3, 9, 9, seed=1), [], 2 if site == "relu" else 1
    assert is_recorded(net, x)
    before = net(x)
    handle = net.get_submodule(site).register_forward_hook(lambda _, args, y: seen.append(y) or 2 * (y + 0))
    for _ in range(3):
        got = net(x)
        assert same_bits(got, plain(net, x)) and not torch.equal(got, before)
    assert len(seen) == 6 * calls  # also those of a copy
    handle.remove()
    for _ in range(3):
        assert same_bits(net(x), before)
    assert not runs_layers(net, x) and len(seen) == 6 * calls


@torch.no_grad()
def test_a_hook_for_all_modules_is_called(net: nn.Module):
    x, seen = drawn(2, 3, 9, 9, seed=1), []
    assert is_recorded(net, x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        net(x)
    finally:
        handle.remove()
    assert net.stem in seen and net in seen


CHANGES: dict[str, Any] = {
    "a bias in place": lambda net: net.stem.bias.mul_(2),
    "a scale in place": lambda net: net.point.scale.mul_(2),
    "codes": lambda net: setattr(net.each, "codes", net.each.codes.flip(0)),
    "a grid": lambda net: net.fc.input_quantizer.scale.mul_(0.5),
    "all tensors": lambda net: net.load_state_dict({k: v.flip(0) for k, v in net.state_dict().items()}),
    "a module": lambda net: setattr(net, "pool", nn.AvgPool2d(2)),
    "an attribute": lambda net: setattr(net, "adds", False),
    "a list": lambda net: net.steps.append(2),
    "a layer's attribute": lambda net: setattr(net.pool, "kernel_size", 3),
    "a forward": lambda net: setattr(net, "body", lambda x: net.stem(x) + 0),
    "a class": lambda net: setattr(net.pool, "__class__", type("Twice", (nn.MaxPool2d,), {"forward": twice})),
}


def twice(self: Any, x: Tensor) -> Tensor:
    return 2 * F.max_pool2d(x, 2)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_network_are_seen(net: nn.Module, change: str):
    x = drawn(2, 3, 9, 9, seed=1)
    assert is_recorded(net, x)
    before = net(x)
    CHANGES[change](net)
    for _ in range(3):
        got = net(x)
        assert not torch.equal(got, before) and same_bits(got, nn.Module.__call__(net, x))
    assert not runs_layers(net, x)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else super().forward(-x)


class BranchesInside(Net):
    def body(self, x: Tensor) -> Tensor:
        y = super().body(x)
        return y if float(y.sum()) > 3 else 2 * y


class Keeps(Net):
    def body(self, x: Tensor) -> Tensor:
        self.seen = super().body(x)
        return self.seen


EVERYWHERE: list[Tensor] = []


class KeepsElsewhere(Net):
    def body(self, x: Tensor) -> Tensor:
        EVERYWHERE.append(super().body(x))
        return EVERYWHERE[-1]


class Counts(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Draws(Net):
    def body(self, x: Tensor) -> Tensor:
        return F.dropout(super().body(x), 0.5, training=True)


class WritesInPlace(Net):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x.clamp_(-1, 1))


class WritesIntoAView(Net):
    def body(self, x: Tensor) -> Tensor:
        x[:, 1:].mul_(2)
        return super().body(x)


class LooksAtValues(Net):
    def body(self, x: Tensor) -> Tensor:
        y = super().body(x)
        return y * float(y.detach().numpy().max())


class GivesMore(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [
        Branches,
        BranchesInside,
        Keeps,
        KeepsElsewhere,
        Counts,
        Draws,
        WritesInPlace,
        WritesIntoAView,
        LooksAtValues,
        GivesMore,
    ],
)
def test_what_depends_on_more_than_the_form_of_the_input_is_not_recorded(kind: type[Net]):
    net = converted(kind(), 2, 3, 9, 9)
    EVERYWHERE.clear()
    kept = getattr(net, "calls", 0)
    for seed in range(4):
        x = drawn(2, 3, 9, 9, seed=seed) + (seed % 2) - 0.5
        torch.manual_seed(seed)
        got = net(x.clone())
        torch.manual_seed(seed)
        want = plain(net, x.clone())
        assert all(map(same_bits, got, want)) if kind is GivesMore else same_bits(got, want)
    assert runs_layers(net, x)
    assert kind is not KeepsElsewhere or len(EVERYWHERE) == 2 * 4 + 1
    assert kind is not Counts or net.calls == kept + 5


@torch.no_grad()
def test_copies_and_files_hold_nothing_of_it(net: nn.Module):
    x = drawn(2, 3, 9, 9, seed=1)
    before = [*net.state_dict()]
    assert is_recorded(net, x)
    assert type(net).__name__ == "Net" and isinstance(net, Net) and [*net.state_dict()] == before
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for made in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert isinstance(made, RecordsForward) and PREPARED not in made.__dict__
        assert same_bits(made(x), net(x)) and is_recorded(made, x) and same_bits(made(x), net(x))
    with torch.inference_mode():
        inner = copy.deepcopy(net)
        assert same_bits(inner(x), net(x)) and same_bits(inner(x), net(x))
    net.to("meta")
    assert PREPARED not in net.__dict__


@torch.no_grad()
def test_threads_do_not_share_memory(net: nn.Module):
    images = [drawn(2, 3, 9, 9, seed=seed) for seed in range(8)]
    want = [plain(net, x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: [net(x) for x in images], range(12)):
            assert all(map(same_bits, got, want))


ENDS = {
    "a layer": [],
    "its activation in place": [nn.SiLU()],
    "an operation": [nn.Sigmoid()],
    "an operation in place": [nn.LeakyReLU(inplace=True)],
    "a view": [nn.Flatten()],
    "a view of a part": [nn.Unflatten(0, (-1, 1)), nn.Flatten(0, 1)],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_are_the_callers_and_the_memory_between_is_kept(end: str, mode: Any):
    wide = [nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Sigmoid(), nn.Conv2d(8, 8, 1), nn.Tanh(), nn.MaxPool2d(2)]
    net = converted(nn.Sequential(*wide, nn.Conv2d(8, 4, 1), *ENDS[end]), 2, 3, 9, 9)
    images = [drawn(2, 3, 9, 9, seed=seed) for seed in range(4)]
    with mode():
        want = [plain(net, x) for x in images]
        assert is_recorded(net, images[0]) and not runs_layers(net, images[0])
        for run in (torch.no_grad, torch.inference_mode, mode):
            with run():
                got = [net(x) for x in images]
            assert all(map(same_bits, got, want))


REUSES = {
    "read behind it": lambda a: a.tanh() * a.sigmoid() + a,
    "its own square": lambda a: (a.tanh() * a.tanh()) * a.sigmoid(),
    "the gate first": lambda a: a.mean((2, 3), keepdim=True).sigmoid() * a,
    "a part of it": lambda a: a[:, :4].sigmoid() * a[:, 4:],
    "a part that stays": lambda a: torch.cat([a.tanh()[:, :4] * 2, a[:, 4:]], 1),
    "a chain": lambda a: F.elu(F.leaky_relu(F.hardsigmoid(F.hardtanh(a, -9, 9)) * 3, 0.1) * a.sigmoid()),
    "the input": lambda a: a,
}


@pytest.mark.parametrize("name", REUSES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operations_write_over_nothing_that_is_read_again(name: str, mode: Any):
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8 if name != "a part of it" else 4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = REUSES[name](x.sigmoid() * x) if name == "the input" else REUSES[name](self.first(x))
            return self.last(y).sigmoid()

    net, images = converted(Reuses(), 2, 8, 6, 6), [drawn(2, 8, 6, 6, seed=seed) for seed in range(3)]
    given = [x.clone() for x in images]
    with mode():
        want = [plain(net, x) for x in images]
        recorded = is_recorded(net, images[0])
        assert recorded or name == "a part that stays"  # a list of tensors is not recorded
        assert all(map(same_bits, [net(x) for x in images], want)) and all(map(same_bits, images, given))


@torch.no_grad()
def test_few_forms_of_input_are_kept(net: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recorded_forward, "FORMS", 3)
    for size in (8, 9, 10, 11, 12):
        x = drawn(1, 3, size, size)
        assert is_recorded(net, x) and len(net.__dict__[PREPARED]) <= 3
