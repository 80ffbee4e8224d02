"""Functions on tensors that quantize: the public ops, and nothing else. Importing it loads no triton, asks no GPU."""

from gs_kernels.adder.op import adder_conv2d, adder_linear
from gs_kernels.adder.op_int8 import adder_int8
from gs_kernels.fake_quant.op import fake_quant
from gs_kernels.fake_quant.quantize import dequantize, quantize
from gs_kernels.formats import FloatFormat, Granularity, IntFormat, PerChannel, PerGroup, PerTensor
from gs_kernels.gptq_block.op import gptq_block
from gs_kernels.gram.op import gram_
from gs_kernels.hadamard.matrices import hadamard_block, hadamard_matrix
from gs_kernels.hadamard.op import hadamard, hadamard_quantize_rows
from gs_kernels.kl_divergence.op import kl_divergence
from gs_kernels.kv_cache.op import kv_read, kv_write_
from gs_kernels.observe.op import dynamic_fake_quant, minmax, observe_fake_quant
from gs_kernels.observe.qparams import choose_qparams
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed, pack_codes, pack_weight, repack, unpack_codes
from gs_kernels.qconv2d.op import qconv2d
from gs_kernels.qconv2d.op_int8 import qconv2d_int8
from gs_kernels.qmatmul.op import qmatmul
from gs_kernels.qmatmul.op_fp8 import qmatmul_fp8
from gs_kernels.qmatmul.op_int8 import code_sums, qmatmul_int8, quantize_rows, row_sums
from gs_kernels.qmatmul_grouped.op import qmatmul_grouped
from gs_kernels.requantize.op import requantize
from gs_kernels.runtime.dispatch import UnsupportedError
from gs_kernels.score_candidates.op import score_candidates
from gs_kernels.search_clip_ratio.op import search_clip_ratio
from gs_kernels.slb.op import slb_weight
from gs_kernels.slb.optimizer_step import slb_adamw_, slb_sgd_
from gs_kernels.slb.pack_codes import slb_codes, slb_pack

__all__ = [
    "FloatFormat",
    "Granularity",
    "IntFormat",
    "PackedWeight",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "UnsupportedError",
    "adder_conv2d",
    "adder_int8",
    "adder_linear",
    "choose_qparams",
    "code_sums",
    "dequantize",
    "dequantize_packed",
    "dynamic_fake_quant",
    "fake_quant",
    "gptq_block",
    "gram_",
    "hadamard",
    "hadamard_block",
    "hadamard_matrix",
    "hadamard_quantize_rows",
    "kl_divergence",
    "kv_read",
    "kv_write_",
    "minmax",
    "observe_fake_quant",
    "pack_codes",
    "pack_weight",
    "qconv2d",
    "qconv2d_int8",
    "qmatmul",
    "qmatmul_fp8",
    "qmatmul_grouped",
    "qmatmul_int8",
    "quantize",
    "quantize_rows",
    "repack",
    "requantize",
    "row_sums",
    "score_candidates",
    "search_clip_ratio",
    "slb_adamw_",
    "slb_codes",
    "slb_pack",
    "slb_sgd_",
    "slb_weight",
    "unpack_codes",
]
