"""Writes networks as ONNX files and as packages of torch.export."""

from gs_algos.core.moved import keep_old_names

keep_old_names(
    __name__,
    {
        "checkpoint": "gs_algos.llm.quantize_checkpoint",
        "interchange": "gs_algos.llm.interchange",
        "language": "gs_algos.llm.load",
        "onnx_graph": "gs_algos.export.onnx",
        "package": "gs_algos.export.torch_package",
        "transformers_quantizer": "gs_algos.llm.transformers_quantizer",
    },
)
