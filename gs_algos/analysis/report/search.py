"""Reads what a report shows of a search of SLB from the algorithm."""

from __future__ import annotations

from typing import Any

from gs_algos.analysis.report.formats import significant
from gs_algos.qat.slb.algorithm import SLB


def search_of(algorithm: SLB) -> dict[str, Any]:
    """Returns the `search` of a report: what SLB knows of its training before `convert`. It can be kept as JSON.

    "levels" has the share of each layer's weights at each level of its grid. "step" are the `trace` points; "gap" and
    "confidence" have the values of each layer there: the quantization gap `||W_c - W_q|| / ||W_q||`, and the mean of
    each weight's largest probability. Points that no step reached are left out; with `trace=0` all three are.
    """
    levels = {
        site: {significant(level, 2): share for level, share in shares.items()}
        for site, shares in algorithm.level_shares().items()
    }
    traces = algorithm.traces()
    if not traces:
        return {"levels": levels}
    points = len(next(iter(traces.values())))
    steps = [point * algorithm.config.schedule().total_steps / max(1, points - 1) for point in range(points)]
    reached = [i for i in range(points) if all(bool(trace[i, 0].isfinite()) for trace in traces.values())]
    columns = {"gap": 0, "confidence": 1}
    curves = {
        key: {site: trace[reached, column].tolist() for site, trace in traces.items()}
        for key, column in columns.items()
    }
    return {"step": [steps[i] for i in reached], **curves, "levels": levels}
