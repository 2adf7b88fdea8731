"""The work of ``isthmus cloud worker``: run a worker without a server until a signal stops it."""

import os
import signal
import threading

from isthmus.cloud import continuity, logs
from isthmus.cloud.personalise import signing
from isthmus.cloud.personalise.worker import Worker
from isthmus.cloud.settings import CloudSettings
from isthmus.extensions import load_extensions
from isthmus.proto.errors import InvalidInput


def work(settings: CloudSettings) -> None:
    """Run a worker without a server until SIGINT or SIGTERM. Raises IsthmusError if it cannot start.

    The database must be one that a server has made.
    """
    logs.configure(settings.log_level, settings.log_format)
    load_extensions()
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    worker = Worker(settings)
    if not worker.database.shared:
        raise InvalidInput("a worker of its own needs --database postgresql://...; on SQLite the server has one")
    if settings.release is None:
        raise InvalidInput("a worker needs --release")
    worker.database.connect()
    worker.database.check_schema()
    if worker.files.copies is not None:
        worker.files.copies.check()
        continuity.check_joining(worker.database, settings.signing_key_path, worker.files.copies)
    signer = signing.load(settings.signing_key_path)
    continuity.check_key(worker.database, signer, settings.signing_key_path)

    def leave() -> None:
        worker.stop()
        os._exit(0)

    for name in (signal.SIGINT, signal.SIGTERM):
        # A thread, because a signal may arrive in the middle of a transaction of the main thread.
        signal.signal(name, lambda number, frame: threading.Thread(target=leave, name="stop").start())
    print(f"worker {worker.worker} is ready", flush=True)
    worker.run_forever()
