"""The old name of `gs_algos.export.onnx`."""

from gs_algos.core.moved import moved

moved(__name__, "gs_algos.export.onnx")
