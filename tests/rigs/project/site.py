"""The module that writes the generated parts of the reference. It is beside the site's pages, in no package."""

import importlib.util
import sys
from types import ModuleType

from tests.rigs.project.pages import ROOT


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "docs" / "reference_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


reference_pages = _load()
