"""Peers of packed products get our codes in their own formats, and what cannot run here is named with the reason."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from bench.peers import absent, own_bytes, peers, qmatmul
from gs_kernels.pack.pack import unpack_codes
from gs_kernels.qmatmul.ref import qmatmul_ref
from gs_kernels.qmatmul.spec import TOL, cost, make, shape
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.opspec import Case

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: peers do not run in the interpreter")
CPU = torch.device("cpu")


def case(bits, m=3, zero="middle", dtype=torch.float32):
    return make(shape((m, 256), 64, bits, 128, zero), dtype, CPU, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["float_linear", "hqq", "torchao", "bitsandbytes"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_peer_that_runs_here_gives_the_products_of_our_codes(name, bits):
    run = peers("qmatmul").get(name)
    if run is None:
        pytest.skip(f"{name} {absent('qmatmul')[name]}")
    if name == "bitsandbytes" and bits != 8:
        with pytest.raises(ValueError, match="needs 8-bit weights, or 4-bit ones, one row and a GPU"):
            run(*case(bits).args)
        return
    zeros = ("middle",) if name == "bitsandbytes" else ("middle", "points")
    for called in (case(bits, zero=zero) for zero in zeros):
        tol = TOL[torch.float32]
        want = qmatmul_ref(*called.args, activation="silu")
        torch.testing.assert_close(run(*called.args, activation="silu"), want, rtol=tol.rtol, atol=tol.atol)


def test_peers_that_cannot_run_here_are_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("hqq", "conch") else object())
    assert absent("qmatmul") == {"gemlite": "needs a GPU", "hqq": "is not installed", "conch": "is not installed"}
    assert list(peers("qmatmul")) == ["float_linear", "torchao", "bitsandbytes"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_words_for_conch_hold_codes_low_bits_first_along_k(bits):
    weight = case(bits, zero="middle" if bits > 1 else "half").args[1]
    if bits == 1:
        weight = replace(weight, zero=1.0)
    words, scale = qmatmul._conch_parts(weight, torch.float16)
    fields = 32 // bits
    assert words.shape == (256 // fields, 64) and scale.shape == (2, 64) and words.is_contiguous()
    shifts = torch.arange(fields) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)  # [K / fields, N, fields]
    want = unpack_codes(weight.codes, bits, weight.shape, weight.layout)
    assert torch.equal(codes.permute(1, 0, 2).reshape(64, 256), want.int())


def test_grids_that_are_not_symmetric_are_refused_where_a_library_knows_no_others():
    for prepare in (qmatmul._conch_parts, qmatmul._bitsandbytes_parts):
        with pytest.raises(ValueError, match="needs a symmetric grid"):
            prepare(case(4, zero="points").args[1], torch.float16)


def test_vectors_of_4_bits_for_bitsandbytes_are_pairs_first_high_and_a_table():
    weight = case(4, m=1).args[1]
    codes, most, table = qmatmul._bitsandbytes_parts(weight, torch.float32)
    pairs = torch.stack([codes >> 4, codes & 15], -1).view(64, 2, 128)
    real = table[pairs.long()] * most.view(64, 2, 1)
    x = torch.eye(256)
    torch.testing.assert_close(real.view(64, 256).t(), qmatmul_ref(x, weight), rtol=1e-6, atol=1e-7)


def test_a_peer_has_the_bytes_of_its_own_weight_or_none():
    called, ours = case(4, dtype=torch.bfloat16), cost(shape((3, 256), 64, 4, 128), torch.bfloat16).nbytes
    assert own_bytes("qmatmul", "ours", called, ours) == ours
    assert own_bytes("qmatmul", "float_linear", called, ours) == 2 * (64 * 256 + 3 * 256 + 3 * 64)
    assert own_bytes("qmatmul", "gemlite", called, ours) == 0
    assert own_bytes("fake_quant", "torch_fake_quantize", Case((torch.ones(4),), {}), 32) == 32


def test_the_table_of_gemlite_is_asked_for_rows_sizes_group_and_codes_a_word():
    table = {"GEMM": {"(64, 256, 64, 128, 8, 104)": {}}, "GEMV": {"(1, 64, 256, 128, 8, 104)": {}}}
    known = [qmatmul.gemlite_knows(table, m, case(4).args[1]) for m in (1, 16, 64)]
    assert known == [True, False, True]
    assert not qmatmul.gemlite_knows(table, 1, case(2).args[1])


def test_8_bit_floats_hold_the_codes_of_a_weight_with_one_scale_a_row():
    weight = make(shape((3, 256), 64, 4, 256), torch.bfloat16, CPU, torch.Generator().manual_seed(0)).args[1]
    w, scale = qmatmul._scaled_mm_parts(weight, torch.bfloat16)
    got = w.float() * scale.view(-1, 1)
    torch.testing.assert_close(torch.eye(256) @ got.t(), qmatmul_ref(torch.eye(256), weight), rtol=1e-6, atol=1e-7)
