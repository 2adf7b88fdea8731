"""Extensions: selection strategies and scheduling policies that other installed packages add under names of their own.

A package declares a module under the entry-point group ``isthmus.extensions``. The commands, the cloud service and its
worker import that module before they look up a name, and the module registers what it brings::

    # pyproject.toml of the package
    [project.entry-points."isthmus.extensions"]
    nearest = "my_package.isthmus_extension"

    # my_package/isthmus_extension.py
    from isthmus import add_strategy
    from my_package.nearest import nearest

    add_strategy("nearest", nearest)
"""

from importlib.metadata import entry_points
from typing import Final

from isthmus.proto.errors import InvalidInput

GROUP: Final = "isthmus.extensions"


def load_extensions() -> list[str]:
    """Import every declared extension, in order of their names, and return the names. A second call changes nothing.

    Raises InvalidInput, with the names of the extension and its package, if an import fails: a service that silently
    lacks a strategy would answer differently from what its settings say.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    for entry in found:
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            raise InvalidInput(
                f"the extension '{entry.name}' of the package '{package}' cannot be imported: {error}. "
                f"Repair or uninstall that package."
            ) from error
    return [entry.name for entry in found]
