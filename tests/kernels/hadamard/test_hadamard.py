"""Facts about Hadamard matrices and rotations beyond the reference: orders, inverses, errors, tracing, launches."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gs_kernels import hadamard, hadamard_block, hadamard_matrix, hadamard_quantize_rows, quantize_rows
from gs_kernels.hadamard.matrices import factors
from gs_kernels.hadamard.tiles import choose_tile
from gs_kernels.runtime.dispatch import INTERPRET
from tests.helpers import relative_rms, same_bits
from tests.kernels.traces import pretend_sm_90, traced_launches

traced = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: kernels run eagerly only, nothing can be traced")
OPS = torch.ops.gs_kernels


def draw(generator, device, *sizes, dtype=torch.float32):
    x = torch.randn(sizes, generator=generator, device=device).to(dtype)
    signs = 2 * torch.randint(0, 2, sizes[-1:], generator=generator, device=device) - 1
    return x, signs.to(torch.int8)


def test_rows_of_a_matrix_are_orthogonal_for_every_order_up_to_256():
    orders = [n for n in range(1, 257) if factors(n) is not None]
    for n in orders:
        h = hadamard_matrix(n)
        assert torch.equal(h.abs(), torch.ones(n, n)) and torch.equal(h @ h.T, n * torch.eye(n))
    missing = set(range(4, 257, 4)) - set(orders)
    assert missing == {92, 116, 156, 172, 184, 188, 232, 236}  # other constructions have these


@pytest.mark.parametrize(
    "k, order", [(576, 576), (1536, 1536), (4096, 4096), (11008, 11008), (14336, 14336), (29568, 9856), (10, 2), (7, 1)]
)
def test_the_block_is_the_largest_order_that_divides(k, order):
    assert hadamard_block(k) == order


def test_an_unknown_order_is_refused_with_the_one_to_use():
    with pytest.raises(ValueError, match=r"n must be m \* 2\^k .*, got 92; the largest order that divides it is 4"):
        hadamard_matrix(92)


@pytest.mark.parametrize("k, block", [(64, 64), (96, 32), (448, 448), (1536, 512), (35, 1), (328, 328)])
def test_it_is_the_product_with_the_matrix_and_transposed_its_inverse(k, block, generator, device):
    x, signs = draw(generator, device, 5, k)
    matrix = torch.block_diag(*[hadamard_matrix(block)] * (k // block)).double().to(device)
    y = hadamard(x, signs, block=block)
    assert relative_rms(y, (x * signs).double() @ matrix * block**-0.5) < 3e-7
    assert relative_rms(hadamard(y, signs, block=block, transposed=True), x) < 5e-7


def test_an_outlier_is_spread_over_its_block(device):
    x = torch.zeros(1, 64, device=device)
    x[0, 3] = 8.0
    assert torch.equal(hadamard(x).abs(), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k, block", [(64, 64), (448, 448), (96, 32)])
def test_codes_and_scales_are_those_of_the_rotated_rows(k, block, dtype, generator, device):
    x, signs = draw(generator, device, 9, k, dtype=dtype)
    codes, scale = hadamard_quantize_rows(x, signs, block=block)
    want, wanted_scale = quantize_rows(hadamard(x, signs, block=block))
    assert same_bits(codes, want) and same_bits(scale, wanted_scale)


def test_rows_without_and_with_what_is_not_finite(device):
    x = torch.ones(3, 16, device=device)
    x[1, 5] = float("nan")
    y = hadamard(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert hadamard(x[:0]).shape == (0, 16)
    codes, scale = hadamard_quantize_rows(x[:0])
    assert codes.shape == (0, 16) and scale.shape == (0,)


def test_wrong_arguments_are_refused(device):
    x = torch.ones(2, 12, device=device)
    with pytest.raises(TypeError, match=r"x must be a float32 / float16 / bfloat16 tensor, got torch.float64"):
        hadamard(x.double())
    with pytest.raises(ValueError, match=r"x must be \[..., K\] with K >= 1"):
        hadamard(x[:, :0])
    with pytest.raises(ValueError, match="block must divide K, got K=12, block=8; use 12"):
        hadamard(x, block=8)
    with pytest.raises(ValueError, match=r"block must be m \* 2\^k .*, got 6; use 2"):
        hadamard_quantize_rows(x, block=6)
    with pytest.raises(TypeError, match=r"signs must be an int8 tensor, got torch.float32"):
        hadamard(x, torch.ones(12, device=device))
    with pytest.raises(ValueError, match=r"signs must be \[12\]"):
        hadamard(x, torch.ones(6, dtype=torch.int8, device=device))


def test_signs_of_other_values_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match="signs must be 1 and -1, got other values"):
        hadamard(torch.ones(2, 4), torch.tensor([1, -1, 0, 1], dtype=torch.int8))


def test_no_tile_is_larger_than_a_program_holds():
    for k in range(1, 4097):
        tile = choose_tile(hadamard_block(k), 1)
        if tile is not None:
            assert tile.rows * tile.padded * tile.power <= 32768 and tile.small * tile.power == hadamard_block(k)
    assert choose_tile(344 * 32, 1) is None and choose_tile(65536, 1) is None


@traced
def test_opcheck_of_every_op(generator):
    x, signs = draw(generator, "cpu", 3, 24)
    for args in ((x.clone().requires_grad_(), signs, 24, False, ""), (x.clone().requires_grad_(), None, 8, True, "")):
        torch.library.opcheck(OPS.hadamard.default, args)
    torch.library.opcheck(OPS.hadamard_quantize_rows.default, (x, signs, 12, ""))


@traced
def test_it_compiles_to_one_graph_and_export_keeps_one_node(generator):
    x, signs = draw(generator, "cpu", 3, 24)
    run = torch.compile(lambda x, s: hadamard(x, s) * 2, fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(x, signs), 2 * hadamard(x, signs), atol=1e-6)

    class Rotate(torch.nn.Module):
        def forward(self, x, signs):
            return hadamard(x, signs)

    program = torch.export.export(Rotate(), (x, signs))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["gs_kernels.hadamard.default"]


@traced
def test_traced_for_a_gpu_it_is_one_launch_that_writes_its_results(monkeypatch):
    pretend_sm_90(monkeypatch)
    with FakeTensorMode():
        x, signs = torch.ones(3, 448, device="cuda"), torch.ones(448, dtype=torch.int8, device="cuda")
        assert traced_launches(hadamard, x, signs)[0] == [["y_ptr"]]
        assert traced_launches(hadamard_quantize_rows, x, signs)[0] == [["y_ptr", "scale_ptr"]]
