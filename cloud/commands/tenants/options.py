"""The options of ``isthmus cloud tenants``. Free of the libraries that serve, so that help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from isthmus.command_line import check_fields

_Quota = str | None


@dataclass(frozen=True)
class TenantOptions:
    """Which tenant to change, and how. Without a tenant all are listed."""

    add: Annotated[str | None, Option(metavar="NAME", help="Add this tenant, with the quotas that are given.")] = None
    change: Annotated[str | None, Option(metavar="NAME", help="Change the quotas of this tenant.")] = None
    close: Annotated[
        str | None, Option(metavar="NAME", help="Shut this tenant out: its devices, its keys and its open calls.")
    ] = None
    reopen: Annotated[str | None, Option(metavar="NAME", help="Let a closed tenant in again.")] = None
    new_key: Annotated[
        str | None,
        Option(metavar="NAME", help="Make a key of this tenant and write it to --key-file. Older keys stay valid."),
    ] = None
    remove_old_keys: Annotated[
        str | None, Option(metavar="NAME", help="Remove all keys of this tenant but the newest of each purpose.")
    ] = None
    purpose: Annotated[
        Literal["enrol", "query"],
        Option(help="What the new key is for: to enrol devices, or to register and ask image tasks."),
    ] = "enrol"
    key_file: Annotated[Path | None, Option(help="File to write the new key to. It must not exist.")] = None
    devices: Annotated[_Quota, Option(help="Largest number of devices.")] = None
    tasks: Annotated[_Quota, Option(help="Largest number of image tasks.")] = None
    jobs_per_day: Annotated[_Quota, Option(help="Personalisations that may start per day (UTC).")] = None
    queries_per_s: Annotated[
        _Quota, Option(help="Calls, feature frames and images per second, per server; those of one second at once.")
    ] = None
    bytes_per_day: Annotated[_Quota, Option(help="Bytes per day (UTC), received and sent as students.")] = None

    def __post_init__(self) -> None:
        check_fields(self)
        named = (self.add, self.change, self.close, self.reopen, self.new_key, self.remove_old_keys)
        if sum(each is not None for each in named) > 1:
            raise ValueError("give one of --add, --change, --close, --reopen, --new-key and --remove-old-keys")
        if (self.new_key is None) != (self.key_file is None):
            raise ValueError("--new-key and --key-file belong together")
