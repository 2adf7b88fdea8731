"""The loop in separate processes over real gRPC on loopback: one cloud, and one device per client."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from isthmus.demo.devices import client_outcome
from isthmus.demo.outcome import ClientOutcome
from isthmus.demo.processes import MODULE, Child, Family
from isthmus.proto.messages import ratio_name

DEVICE_LIMIT_S: Final = 6 * 3600.0
LISTENING_LIMIT_S: Final = 120.0

Tick = Callable[[], None]


class Loop:
    """Runs a cloud on ``release`` and its devices. All files go below ``folder``, which must not exist.

    ``cloud_python`` and ``edge_python`` are the interpreters of cloud and devices. The processes belong to ``family``.
    """

    def __init__(
        self, family: Family, folder: Path, release: Path, *, cloud_python: Path, edge_python: Path, seed: int
    ) -> None:
        folder.mkdir(parents=True)
        self._family = family
        self._folder = folder
        self._edge_python = edge_python
        self._seed = seed
        address_file = folder / "cloud.address"
        command: list[str | Path] = [cloud_python, *MODULE, "cloud", "serve", "--release", release]
        command += ["--state", folder / "cloud", "--listen", "127.0.0.1:0", "--port-file", address_file]
        self.cloud = family.start("cloud", command)
        self.address = family.wait_for_address(self.cloud, address_file, LISTENING_LIMIT_S)

    def disclose(self, data: Path, clients: Mapping[str, Sequence[str]], on_tick: Tick = lambda: None) -> None:
        """Enrol one device per client and let each write what would leave it. ``clients``: clip names by client.

        No prototype is sent."""
        for client, names in clients.items():
            self._file(client, ".txt").write_text("".join(f"{name}\n" for name in names))
        children = [
            self._device(data, client, "prototypes", ["--json"], output=self._file(client, ".prototypes.json"))
            for client in clients
        ]
        self._family.wait(*children, timeout_s=DEVICE_LIMIT_S, on_tick=on_tick)

    def personalise(
        self, data: Path, clients: Mapping[str, Sequence[str]], ratios: Sequence[float], on_tick: Tick = lambda: None
    ) -> tuple[ClientOutcome, ...]:
        """Run all devices at once until each is personalised and has answered its test clips in every way.

        Half of a client's clips, balanced by class, make the prototypes; the others are tested. Raises ChildFailed.
        """
        chosen = ",".join(ratio_name(ratio) for ratio in ratios)
        children = [
            self._device(
                data, client, "run", ["--ratios", chosen, "--report", str(self._file(client, ".json")), "--once"]
            )
            for client in clients
        ]
        self._family.wait(*children, timeout_s=DEVICE_LIMIT_S, on_tick=on_tick)
        return tuple(
            client_outcome(
                client,
                json.loads(self._file(client, ".json").read_text()),
                json.loads(self._file(client, ".prototypes.json").read_text()),
                ratios,
            )
            for client in clients
        )

    def _device(self, data: Path, client: str, command: str, more: Sequence[str], output: Path | None = None) -> Child:
        words: list[str | Path] = [
            self._edge_python,
            *MODULE,
            "edge",
            command,
            "--cloud",
            self.address,
            "--data",
            data,
        ]
        words += ["--state", self._folder / client, "--clips", self._file(client, ".txt")]
        words += ["--seed", str(self._seed), "--name", client, *more]
        # Several small processes run at once: more than one thread each would slow all of them down.
        return self._family.start(f"{client} {command}", words, env={"OMP_NUM_THREADS": "1"}, output=output)

    def _file(self, client: str, ending: str) -> Path:
        return self._folder / f"{client}{ending}"
