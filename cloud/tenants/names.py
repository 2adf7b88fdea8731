"""PURE: names of tenants, and how a tenant's tasks are named inside.

A task of tenant "acme" is "acme/animals" in the engine and in the database, and "animals" for its clients. No client
can write "/" in a name, so no name reaches another tenant's task. Tasks of the tenant "default" have no prefix.
"""

import re
from typing import Final

from isthmus.cloud.store.tenants import DEFAULT
from isthmus.proto.errors import InvalidInput

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


def check(name: str) -> str:
    """Return the name of a tenant. Raises InvalidInput if it is none."""
    if not _NAME.fullmatch(name):
        raise InvalidInput("tenant: 1 to 32 lower-case letters, digits and hyphens, such as acme")
    return name


def owner(tenant: str) -> str:
    """Return what is in front of the names of a tenant's tasks; "" for the tenant "default"."""
    return "" if tenant == DEFAULT else tenant


def inside(tenant: str, task: str) -> str:
    """Return the name inside of a tenant's task. A name with "/" is no task of anybody; it becomes one of nobody."""
    if "/" in task:
        return f"//{task}"
    return task if tenant == DEFAULT else f"{tenant}/{task}"


def outside(tenant: str, name: str) -> str | None:
    """Return the tenant's own name of a task, or None if the task is another tenant's.

    >>> outside("acme", "acme/animals"), outside("acme", "animals"), outside("default", "animals")
    ('animals', None, 'animals')
    """
    owner, slash, task = name.rpartition("/")
    return task if (owner if slash else DEFAULT) == tenant else None
