"""The cost model: what a launch has to do is read from its IR, and the slowest of its parts is its time."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import specs

if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1: kernels cannot be compiled in this process", allow_module_level=True)

triton = pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")
tl = pytest.importorskip("triton.language", reason="Triton is not installed: there are no kernels to compile")

from gs_kernels.aot import record_launches, report  # noqa: E402
from gs_kernels.aot.ir_cost import work_of  # noqa: E402
from gs_kernels.aot.trace import traced  # noqa: E402
from gs_kernels.tuning.cost_model import estimate, estimate_all, predict_trace  # noqa: E402
from gs_kernels.tuning.gpu_specs import CARDS, card_of, find_card  # noqa: E402

H100 = CARDS["h100"]


@triton.jit
def _update_kernel(y_ptr, x_ptr, table_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    y = tl.load(y_ptr + offs, mask=mask) + tl.load(x_ptr + offs, mask=mask) * tl.load(table_ptr)
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit
def _product_kernel(y_ptr, a_ptr, b_ptr, K, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(tl.cdiv(K, BLOCK * SPLIT)):
        a_ptr += BLOCK
        a = tl.load(a_ptr + offs[:, None] * K + offs[None, :])
        b = tl.load(b_ptr + offs[None, :] * K + k * BLOCK + offs[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _endless_kernel(y_ptr, n_ptr, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.float32)
    for k in range(tl.load(n_ptr)):
        acc += tl.load(y_ptr + k * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), acc)


def _meta(n, dtype=torch.float32):
    return torch.empty(n, dtype=dtype, device="meta")


def _update(n=100_000, programs=98):
    with record_launches("sm_90") as launches:
        _update_kernel[(programs,)](_meta(n), _meta(n), _meta(1), n, BLOCK=1024)
    return launches[0]


def test_a_tensor_that_is_read_and_written_counts_twice():
    work = work_of(_update())
    assert (work.loaded, work.stored, work.programs, work.turns) == (800_004, 400_000, 98, 1)
    assert work.flops == {}


def test_turns_and_products_follow_from_the_sizes():
    x = _meta(64 * 1000, torch.float16)
    with record_launches("sm_90") as launches:
        _product_kernel[(3, 2)](_meta(64 * 64), x, x, 1000, SPLIT=2, BLOCK=64)
    work = work_of(launches[0])
    assert work.turns == 8
    assert work.flops == {"16bit": 6 * 8 * 2 * 64**3}
    assert work.loaded == 2 * x.nbytes


def test_a_loop_whose_end_is_in_memory_is_refused():
    with record_launches("sm_90") as launches:
        _endless_kernel[(1,)](_meta(1024), _meta(1, torch.int32), BLOCK=128)
    with pytest.raises(ValueError, match="bounds of a loop must follow from sizes and program ids"):
        work_of(launches[0])


ONE_KERNEL = ("fake_quant", "quantize", "dequantize", "dynamic_fake_quant", "slb_pack", "quantize_rows")


@pytest.mark.parametrize("spec", [s for s in specs() if s.name in ONE_KERNEL], ids=lambda s: s.name)
def test_kernels_move_the_bytes_that_their_spec_says_cannot_be_avoided(spec):
    (group,) = list(spec.bench_shapes)[-1:]
    shape, dtype = spec.bench_shapes[group][0], torch.bfloat16
    case = spec.make(shape, dtype, torch.device("meta"), torch.Generator())
    trace = traced(lambda: spec.run(*case.args, **case.kwargs), "sm_90")
    assert sum(work_of(launch).nbytes for launch in trace.launches) == spec.cost(shape, dtype).nbytes
    assert trace.calls == []


def test_a_product_as_a_float_layer_does_it_is_in_the_trace_with_what_it_multiplies():
    (spec,) = (s for s in specs() if s.name == "qmatmul")
    (shape,) = (s for s in spec.bench_shapes["w4"] if s["n"] == 4096 and s["x"] == (4096, 4096))
    case = spec.make(shape, torch.bfloat16, torch.device("meta"), torch.Generator())
    trace = traced(lambda: spec.run(*case.args, **case.kwargs), "sm_90")
    assert [launch.compiled.name for launch in trace.launches] == ["_dequantize_kernel"]
    assert [(call.name, call.flops, call.kind) for call in trace.calls] == [("aten::linear", 2 * 4096**3, "16bit")]
    dequantize, multiply = predict_trace(trace, H100)
    assert dequantize.bound == "bytes" and multiply.bound == "products"
    assert multiply.products_us == pytest.approx(2 * 4096**3 / 989.4e6)


def test_ops_on_a_cpu_are_traced_and_computed():
    x = torch.randn(8, 1024, requires_grad=True)
    seen = []

    def call():
        from gs_kernels import PerChannel, fake_quant

        y = fake_quant(x, torch.ones(8), torch.zeros(8), qmin=-8, qmax=7, granularity=PerChannel(0))
        y.sum().backward()
        seen.append(y)

    trace = traced(call, "sm_90")
    assert torch.equal(seen[0], x.round().clamp(-8, 7))
    assert [launch.compiled.name for launch in trace.launches] == ["_fake_quant_fwd_kernel", "_fake_quant_bwd_kernel"]
    assert "aten::sum" in [call.name for call in trace.calls]


@pytest.fixture(scope="module")
def measured():
    launch = _update()
    return report(launch.compiled, "sm_90", 1024), work_of(launch)


def test_the_slowest_part_is_the_bound(measured):
    kernel, work = measured
    many = dataclasses.replace(work, programs=1320, loaded=2 * 10**9, stored=0)
    got = estimate(kernel, many, H100)
    assert got.bound == "bytes" and got.us == pytest.approx(H100.launch_us + 2e9 / 3350e3)
    slow = dataclasses.replace(kernel, instructions=10**6)
    got = estimate(slow, many, H100)
    assert got.bound == "instructions"
    assert got.instructions_us == pytest.approx(10 * kernel.num_warps * 1e6 / (4 * 1.755e3))
    got = estimate(kernel, dataclasses.replace(many, flops={"16bit": 989_400 * 10**9}), H100)
    assert got.bound == "products" and got.products_us == pytest.approx(1e6)


def test_a_last_wave_that_is_not_full_costs_a_whole_one(measured):
    kernel, work = measured
    times = [
        estimate(kernel, dataclasses.replace(work, programs=n, flops={"16bit": n * 10**9}), H100) for n in (132, 133)
    ]
    assert times[1].products_us == pytest.approx(2 * times[0].products_us)
    assert times[1].instructions_us == pytest.approx(2 * times[0].instructions_us)


def test_few_programs_share_in_the_bandwidth_of_few_processors(measured):
    kernel, work = measured
    half, all_ = (estimate(kernel, dataclasses.replace(work, programs=n), H100).bytes_us for n in (66, 132))
    assert half == pytest.approx(2 * all_)


def test_what_one_launch_leaves_for_the_next_stays_in_l2_if_it_fits(measured):
    kernel, work = measured
    first = dataclasses.replace(work, programs=1320, loaded=0, stored=20 << 20, writes={1: 20 << 20})
    second = dataclasses.replace(work, programs=1320, loaded=20 << 20, stored=4, reads={1: 20 << 20})
    alone = [estimate(kernel, one, H100).bytes_us for one in (first, second)]
    got = [one.bytes_us for one in estimate_all([kernel, kernel], [first, second], H100)]
    assert got == pytest.approx([us * 3350 / H100.l2_bandwidth for us in alone], rel=1e-3)
    large = [dataclasses.replace(one, reads={1: 30 << 20}, writes={1: 30 << 20}) for one in (first, second)]
    assert [one.bytes_us for one in estimate_all([kernel, kernel], large, H100)] == pytest.approx(alone)


def test_what_several_programs_ask_for_passes_l2_for_each():
    x = _meta(64 * 1000, torch.float16)
    with record_launches("sm_90") as launches:
        _product_kernel[(300, 1)](_meta(64 * 64), x, x, 1000, SPLIT=1, BLOCK=64)
    assert work_of(launches[0]).asked == 300 * (16 * 2 * 64 * 64 * 2 + 4 * 64 * 64)


def test_what_does_not_fit_the_card_is_refused(measured):
    kernel, work = measured
    with pytest.raises(ValueError, match="A100 SXM4 80GB runs sm_80, got a kernel for sm_90"):
        estimate(kernel, work, CARDS["a100"])
    with pytest.raises(ValueError, match="a block of _update_kernel must fit an SM, got none"):
        estimate(dataclasses.replace(kernel, occupancy=SimpleNamespace(blocks=0)), work, H100)
    with pytest.raises(ValueError, match="must know a peak for fp4 products"):
        estimate(kernel, dataclasses.replace(work, flops={"fp4": 1}), H100)


def test_cards_are_found_by_their_name_and_by_the_name_of_a_driver():
    assert find_card("h100") is card_of("NVIDIA H100 80GB HBM3") is H100
    assert card_of("NVIDIA A100-SXM4-80GB") is CARDS["a100"]
    assert card_of("Tesla T4") is None
    with pytest.raises(ValueError, match="must be one of a100, h100, h200, b200, got 'v100'"):
        find_card("v100")
