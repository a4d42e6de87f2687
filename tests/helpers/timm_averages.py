"""timm's averages of weights, from its own file.

`import timm` needs torchvision, which has to be built for the very build of torch that is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from types import ModuleType


def _load() -> ModuleType:
    path = importlib.metadata.distribution("timm").locate_file("timm/utils/model_ema.py")
    spec = importlib.util.spec_from_file_location("timm_model_ema", str(path))
    if spec is None or spec.loader is None:
        raise ImportError(f"timm has no {path}; run `make setup`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_timm = _load()
ModelEma, ModelEmaV2, ModelEmaV3 = _timm.ModelEma, _timm.ModelEmaV2, _timm.ModelEmaV3
