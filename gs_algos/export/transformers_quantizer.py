"""The old name of `gs_algos.llm.transformers_quantizer`."""

from gs_algos.core.moved import moved

moved(__name__, "gs_algos.llm.transformers_quantizer")
