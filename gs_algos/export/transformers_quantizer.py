"""How `from_pretrained` builds the packed layers of a folder: importing this registers `quant_method: golden-stick`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gs_algos.export.folder import read_folder
from gs_algos.export.packed_config import METHOD, read_config
from gs_algos.export.verify import check_tensors, verify_files
from gs_algos.ptq.weights import install
from gs_algos.quant.fast_path import leave_fast_path
from gs_algos.quant.packed import Packed
from gs_kernels.pack.checks import check_packed, check_packed_values


@register_quantization_config(METHOD)
class GoldenStickConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json, as it stands there."""

    def __init__(self, **data: Any) -> None:
        self.__dict__.update(data)
        self.packed_config()

    def packed_config(self) -> Any:
        return read_config(self.__dict__, "quantization_config")


@register_quantizer(METHOD)
class GoldenStickQuantizer(HfQuantizer):
    """Puts empty packed layers into the skeleton, which Transformers then fills by name."""

    quantization_config: GoldenStickConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config.packed_config()
        for folder in {Path(file).parent for file in kwargs.get("checkpoint_files") or ()}:
            check_tensors(read_folder(folder, "from_pretrained", code=True), config, "from_pretrained")
            verify_files(folder, config.files, "from_pretrained")
        # what is saved from this model has files of its own
        self.quantization_config.__dict__.pop("files", None)
        for owner, format in config.layers.items():
            install(model, config.names(owner), format.empty("meta"))
        leave_fast_path(model)
        # these share one packed weight already, and have no parameter to tie
        packed = {f"{name}.weight" for name in (*config.layers, *config.tied)}
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in packed}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, Packed) and not module.tied:
                check_packed("from_pretrained", module.packed, name)
                check_packed_values("from_pretrained", module.packed, name)
                module.arrange()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: packed weights are frozen, and gradients pass through them
