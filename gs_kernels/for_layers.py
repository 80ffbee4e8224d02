"""Offers layers the parts of an op's call that do not depend on the values of x: made once, called often.

Beside `gs_kernels` itself, its `activations`, `pack`, `runtime` and `tuning`, this is what `gs_algos` may import.
The public ops check every argument in each call and then do the same.
"""

from gs_kernels.adder.op_int8 import prepared_adder_int8
from gs_kernels.decoder_step.cpu import DecoderLayer, decoder_step_of
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.program.cpu import Program, places_in_time
from gs_kernels.program.recording import KernelCall, OperationCall, Refusal, noted, recording
from gs_kernels.qconv2d.checks import LARGEST_GROUP
from gs_kernels.qconv2d.cpu.int8 import Int8Convolution
from gs_kernels.qconv2d.geometry import make_geometry
from gs_kernels.qconv2d.op import prepared_qconv2d
from gs_kernels.qconv2d.op_int8 import prepared_qconv2d_int8
from gs_kernels.qmatmul.checks import sums_fit
from gs_kernels.qmatmul.op import prepared_qmatmul
from gs_kernels.qmatmul.op_int8 import prepared_qmatmul_int8
from gs_kernels.requantize.cpu import is_dense
from gs_kernels.requantize.grid import Grid, make_grid
from gs_kernels.requantize.op import prepared_requantize
from gs_kernels.requantize.passes import to_codes_of

__all__ = [
    "LARGEST_GROUP",
    "DecoderLayer",
    "Grid",
    "Int8Convolution",
    "KernelCall",
    "OperationCall",
    "Program",
    "Refusal",
    "UnsuitableError",
    "decoder_step_of",
    "is_dense",
    "make_geometry",
    "make_grid",
    "noted",
    "places_in_time",
    "prepared_adder_int8",
    "prepared_qconv2d",
    "prepared_qconv2d_int8",
    "prepared_qmatmul",
    "prepared_qmatmul_int8",
    "prepared_requantize",
    "recording",
    "sums_fit",
    "to_codes_of",
]
