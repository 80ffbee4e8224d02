"""Compiles any kernel launch for a GPU that is not there, and checks the machine code that comes out.

    with compile_launches("sm_90") as kernels:
        launcher(x_meta)
    print(report(kernels[0], "sm_90", elements=1024))

`python -m gs_kernels.aot` does it for every case of every op and fails if one is out of its bounds.
"""

from gs_kernels.aot.collect import Specialization, collect, collect_launches, spec_call
from gs_kernels.aot.compile import Launch, compile_launches, record_launches
from gs_kernels.aot.report import Report, check, launches_of, report, reports
from gs_kernels.aot.targets import TARGETS, Occupancy, occupancy

__all__ = [
    "TARGETS",
    "Launch",
    "Occupancy",
    "Report",
    "Specialization",
    "check",
    "collect",
    "collect_launches",
    "compile_launches",
    "launches_of",
    "occupancy",
    "record_launches",
    "report",
    "reports",
    "spec_call",
]
