"""The work of ``isthmus cloud tenants``."""

import hashlib
import os
import secrets
from dataclasses import astuple, replace
from typing import Any, Final

import typer

from isthmus.cloud.commands.tenants.options import TenantOptions
from isthmus.cloud.store import audit, tenants
from isthmus.cloud.store.audit import Entry
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.tenants import DEFAULT, Key, Quotas, Tenant
from isthmus.cloud.tenants import names
from isthmus.command_line import fail, print_table
from isthmus.proto.errors import InvalidInput

_NONE: Final = "none"


def change_tenants(database: Database, options: TenantOptions) -> None:
    """Change what ``options`` names, or list all tenants. Raises InvalidInput, OSError."""
    with database.reading() as connection:
        now_s = database.clock_s(connection)
    if options.add is not None:
        known = {tenant.name for tenant in tenants.listing(database)}
        name = names.check(options.add)
        if name in known:
            fail(f"there is a tenant {name} already; --change changes its quotas")
        quotas = _quotas(Quotas(), options)
        tenants.put(database, Tenant(name, now_s, quotas))
        _note(database, now_s, name, "added", _shown(quotas))
        typer.echo(f"tenant {name} is added")
    elif (name_ := options.change) is not None:
        tenant = _known(database, name_, now_s)
        quotas = _quotas(tenant.quotas, options)
        tenants.put(database, replace(tenant, quotas=quotas))
        _note(database, now_s, name_, "changed", _shown(quotas))
        typer.echo(f"tenant {name_} is changed: {_shown(quotas)}")
    elif (name_ := options.close or options.reopen) is not None:
        closed_s = now_s if options.close is not None else None
        tenants.put(database, replace(_known(database, name_, now_s), closed_s=closed_s))
        what = "reopened" if closed_s is None else "closed"
        _note(database, now_s, name_, what)
        typer.echo(f"tenant {name_} is {what}")
    elif options.new_key is not None:
        _make_key(database, options, now_s)
    elif (name_ := options.remove_old_keys) is not None:
        _known(database, name_, now_s)
        newest = {key.purpose: key.created_s for key in tenants.keys(database) if key.tenant == name_}
        gone = sum(
            tenants.remove_keys(database, name_, before_s=created_s, purpose=purpose)
            for purpose, created_s in newest.items()
        )
        _note(database, now_s, name_, "removed keys", str(gone))
        typer.echo(f"{gone} keys of tenant {name_} are removed")
    else:
        _list(database, now_s)


def _make_key(database: Database, options: TenantOptions, now_s: float) -> None:
    assert options.new_key is not None and options.key_file is not None
    tenant = _known(database, options.new_key, now_s)
    if tenant.name == DEFAULT:
        raise InvalidInput(
            "the keys of the tenant 'default' are those of --enrolment-key-file and --elastic-key-file of the server"
        )
    secret = secrets.token_urlsafe(32)
    # Only its owner can read the file, from its first byte on.
    with os.fdopen(os.open(options.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{secret}\n")
    tenants.add_key(database, Key(hashlib.sha256(secret.encode()).digest(), tenant.name, options.purpose, now_s))
    _note(database, now_s, tenant.name, "made key", options.purpose)
    typer.echo(f"{options.key_file} holds a key of tenant {tenant.name}, to {options.purpose}")


def _known(database: Database, name: str, now_s: float) -> Tenant:
    for tenant in tenants.listing(database):
        if tenant.name == name:
            return tenant
    if name == DEFAULT:
        return Tenant(DEFAULT, now_s)
    fail(f"no tenant {name}; 'isthmus cloud tenants' lists them, and --add adds one")


def _quotas(before: Quotas, options: TenantOptions) -> Quotas:
    given = {
        "most_devices": options.devices,
        "most_tasks": options.tasks,
        "jobs_per_day": options.jobs_per_day,
        "queries_per_s": options.queries_per_s,
        "bytes_per_day": options.bytes_per_day,
    }
    try:
        changed: dict[str, Any] = {
            name: None if text == _NONE else float(text) if name == "queries_per_s" else int(text)
            for name, text in given.items()
            if text is not None
        }
        return replace(before, **changed)
    except ValueError:
        raise InvalidInput("a quota is a number of at least 0, or 'none'") from None


def _list(database: Database, now_s: float) -> None:
    used = tenants.used(database, tenants.day_of(now_s))
    known = {tenant.name: tenant for tenant in tenants.listing(database)}
    known.setdefault(DEFAULT, Tenant(DEFAULT, 0.0))
    keys = [key.tenant for key in tenants.keys(database)]
    rows = []
    for name, tenant in sorted(known.items()):
        today = used.get(name, tenants.Usage())
        state = "open" if tenant.closed_s is None else "closed"
        limits = (_limit(each) for each in astuple(tenant.quotas))
        rows.append((name, state, str(keys.count(name)), *limits, str(today.jobs), str(today.bytes)))
    quotas = ("devices", "tasks", "jobs/day", "queries/s", "bytes/day")
    print_table(("tenant", "state", "keys", *quotas, "jobs today", "bytes today"), rows, tabs_in_pipes=True)


def _limit(value: float | None) -> str:
    return _NONE if value is None else str(value) if isinstance(value, int) else f"{value:g}"


def _shown(quotas: Quotas) -> str:
    return f"devices, tasks, jobs/day, queries/s, bytes/day: {', '.join(map(_limit, astuple(quotas)))}"


def _note(database: Database, now_s: float, tenant: str, what: str, detail: str = "") -> None:
    audit.note(database, Entry(now_s, tenant, "operator", what, tenant, detail))
