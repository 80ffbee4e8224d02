"""An engine that compiles its model has one op for each packed product, and CUDA graphs can hold it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gs_algos.quant.packed.module import WEIGHT_TENSORS, PackedFormat
from gs_algos.quant.packed.round_to_nearest import round_to_nearest
from gs_algos.serving.engine_parameters import get_weight, set_weight
from gs_algos.serving.engine_product import engine_qmatmul, engine_qmatmul_grouped
from gs_kernels import PackedWeight, qmatmul, qmatmul_grouped
from gs_kernels.pack.schema import flatten
from gs_kernels.runtime.dispatch import INTERPRET
from tests.llm.recorded_graph import RecordedGraphs

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: nothing here is a kernel")

NAMES = {part: f"weight_{part}" for part in WEIGHT_TENSORS}


class Layer(nn.Module):
    """What the plugin makes of a layer of vLLM."""

    def __init__(self, scheme: str = "int4@group:32") -> None:
        super().__init__()
        weight = round_to_nearest(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), scheme)
        self.format = PackedFormat.of(weight)
        self.layout = set_weight(self, NAMES, weight, "up")
        self.bias = nn.Parameter(torch.ones(48), requires_grad=False)

    def weight(self) -> PackedWeight:
        return get_weight(self, NAMES, self.format, self.layout)

    def forward(self, x: Tensor) -> Tensor:
        return engine_qmatmul(x, self.weight(), self.bias)


def rows(count: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


def targets_of(layer: nn.Module, calls: list[tuple[Tensor, ...]], want: Callable[..., Tensor]) -> list[str]:
    """The ops of the one graph that a layer is compiled to for all calls, whose results are as wanted."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=compiler), dynamic=True, fullgraph=True)
        for args in calls:
            assert torch.equal(compiled(*args), want(*args))
    assert len(graphs) == 1
    return [target for target in graphs[0] if not target.startswith("aten.sym")]


@pytest.mark.parametrize("scheme", ["int4@group:32", "int2@group:32:asym", "int8@channel", "int1@group:32"])
def test_a_compiled_layer_is_one_op_for_all_numbers_of_rows(scheme: str):
    layer = Layer(scheme)
    targets = targets_of(layer, [(rows(n),) for n in (5, 2, 300)], lambda x: qmatmul(x, layer.weight(), layer.bias))
    assert targets == ["gs_serving.qmatmul.default"]


class Experts(Layer):
    """Three experts of 16 rows."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return engine_qmatmul_grouped(x, self.weight(), offsets)


def test_compiled_experts_are_one_op_for_all_numbers_of_rows():
    layer = Experts()
    calls = [(rows(n), torch.tensor([n // 2, n // 2, n])) for n in (5, 2, 300)]
    targets = targets_of(layer, calls, lambda x, offsets: qmatmul_grouped(x, layer.weight(), offsets))
    assert targets == ["gs_serving.qmatmul_grouped.default"]


def test_a_graph_of_a_layer_runs_again_on_other_values():
    layer, graphs = Layer(), RecordedGraphs()
    x, y = rows(3), torch.zeros(3, 48)

    def step() -> None:
        y.copy_(layer(x))

    with torch.no_grad():
        replay = graphs(step, y.zero_)
        x.copy_(rows(3).flip(0))
        replay()
    assert torch.equal(y, qmatmul(rows(3).flip(0), layer.weight(), layer.bias))


def test_the_op_is_right_by_torch_s_own_checks():
    layer = Layer()
    args = (rows(3), *flatten(layer.weight()), layer.bias)
    torch.library.opcheck(torch.ops.gs_serving.qmatmul.default, args)
    experts = (rows(3), *flatten(layer.weight()), torch.tensor([1, 1, 3]))
    torch.library.opcheck(torch.ops.gs_serving.qmatmul_grouped.default, experts)
