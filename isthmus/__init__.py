"""Isthmus: private, personalised multimodal inference between a device and the cloud.

The rooms of the house are top-level folders of the repository (``edge/``, ``cloud/``, ``proto/``,
``distill/``, ``data/``) and sub-packages here (``isthmus.edge`` and so on).
"""

from pathlib import Path

__version__ = "0.1.0.dev0"

# In a checkout the sub-packages stand beside this folder, not in it. The path is extended so that
# ``python -m isthmus.cli`` works from the repository's root with a wheel installed or with nothing installed.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "edge" / "__init__.py").is_file():
    __path__.append(str(_root))
del _root
