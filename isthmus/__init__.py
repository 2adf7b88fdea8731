"""Isthmus: personal audio-visual models on devices, and elastic vision transformers in the cloud.

``isthmus.__all__`` is the public API; docs/reference/api.md says what is promised of it. A public name is imported from
its room when it is first used, so ``import isthmus`` loads neither torch nor gRPC. The rooms themselves
(``isthmus.edge``, ``isthmus.cloud``, ``isthmus.distill``, ``isthmus.data``, ``isthmus.proto``) are top-level folders of
the repository. Their module paths are not public and may change in any release.
"""

import difflib
from pathlib import Path
from typing import Any, Final

import lazy_loader

__version__ = "0.2.0.dev0"

# In a checkout the sub-packages stand beside this folder, not in it. The path is extended so that
# ``python -m isthmus.cli`` works from the repository's root with a wheel installed or with nothing installed.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "edge" / "__init__.py").is_file():
    __path__.append(str(_root))
del _root

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_RENAMED: Final[dict[str, str]] = {}
"""Public names of earlier releases and what replaced each, kept for two releases (docs/reference/api.md)."""


def __getattr__(name: str) -> Any:
    """Imports a public name. Raises AttributeError for another name, and says what replaced it or what is nearest."""
    if name in __all__ or name.startswith("__"):
        return _load(name)
    if name in _RENAMED:
        raise AttributeError(f"isthmus.{name} is now {_RENAMED[name]}", name=name)
    near = difflib.get_close_matches(name, __all__, n=1)
    hint = f"Did you mean 'isthmus.{near[0]}'?" if near else "'isthmus.__all__' lists the public names."
    raise AttributeError(f"isthmus has no public name '{name}'. {hint}", name=name)
