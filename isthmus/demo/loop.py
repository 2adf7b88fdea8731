"""The loop in separate processes over real gRPC on loopback: one cloud, and one device per client."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from isthmus.demo.devices import client_outcome
from isthmus.demo.outcome import ClientOutcome, Correction, Spoken
from isthmus.demo.processes import MODULE, Child, Family
from isthmus.proto.messages import ratio_name

DEVICE_LIMIT_S: Final = 6 * 3600.0
LISTENING_LIMIT_S: Final = 120.0
CORRECTIONS: Final = 8
SAID: Final = "I have had quite a day. What do you say to me?"
"""What each client's user says to the language model."""
ONE_THREAD: Final = {"OMP_NUM_THREADS": "1"}
"""Several small processes run at once: more than one thread each would slow all of them down."""
TRAINING_THREADS: Final = {"OMP_NUM_THREADS": "2"}
"""The order of floating-point sums depends on the number of threads, and training amplifies the difference. A fixed
number gives the same students for the same seed, whatever the caller's environment says."""

Tick = Callable[[], None]


class Loop:
    """Runs a cloud on ``release`` and its devices. All files go below ``folder``, which must not exist.

    ``cloud_python`` and ``edge_python`` are the interpreters of cloud and devices. The processes belong to ``family``.
    ``shares_state``: the devices run with consent to send how their users feel.
    """

    def __init__(
        self,
        family: Family,
        folder: Path,
        release: Path,
        *,
        cloud_python: Path,
        edge_python: Path,
        seed: int,
        shares_state: bool = False,
    ) -> None:
        folder.mkdir(parents=True)
        self._cloud_python = cloud_python
        self._consent = ["--share-state"] if shares_state else []
        self._family = family
        self._folder = folder
        self._edge_python = edge_python
        self._seed = seed
        address_file = folder / "cloud.address"
        command: list[str | Path] = [cloud_python, *MODULE, "cloud", "serve", "--release", release]
        command += ["--state", folder / "cloud", "--listen", "127.0.0.1:0", "--port-file", address_file]
        self.cloud = family.start("cloud", command, env=TRAINING_THREADS)
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
    ) -> None:
        """Run all devices at once until each is personalised and has answered its test clips in every way.

        Half of a client's clips, balanced by class, personalise it; the others are tested. Raises ChildFailed.
        """
        chosen = ",".join(ratio_name(ratio) for ratio in ratios)
        self._run(data, clients, ["--ratios", chosen], ".json", on_tick)

    def correct(
        self,
        data: Path,
        clients: Mapping[str, Sequence[str]],
        label_of: Mapping[str, str],
        on_tick: Tick = lambda: None,
        *,
        count: int = CORRECTIONS,
    ) -> dict[str, tuple[Correction, ...]]:
        """Let each device ask about ``count`` of its clips, answer with ``label_of``, and run the devices again.

        The devices choose what they ask about. They ask about selection clips alone: they remember no others. Without
        a person model nothing is asked. Returns the corrections by client. Raises ChildFailed, and ValueError for a
        question about a test clip.
        """
        made: dict[str, tuple[Correction, ...]] = dict.fromkeys(clients, ())
        able = self.correctable(clients)
        for _ in range(count):
            open_ones = [client for client in able if len(made[client]) < len(self._selection(client))]
            asked = [self._talk(client, "ask", ["--a-day", str(2 * count), "--json"]) for client in open_ones]
            self._family.wait(*asked, timeout_s=DEVICE_LIMIT_S, on_tick=on_tick)
            answers = []
            for client in open_ones:
                question = json.loads(self._file(client, ".ask.json").read_text())
                clip = str(question["clip"])
                if clip not in self._selection(client):
                    raise ValueError(f"{client} asked about {clip}, which is no selection clip")
                made[client] += (Correction(clip, next(iter(question["guesses"])), label_of[clip]),)
                answers.append(self._talk(client, "correct", [clip, label_of[clip]]))
            self._family.wait(*answers, timeout_s=DEVICE_LIMIT_S, on_tick=on_tick)
        taught = {client: clients[client] for client in able}
        if taught:
            self._run(data, taught, ["--ratios", "1"], ".taught.json", on_tick)
        return made

    def correctable(self, clients: Iterable[str]) -> list[str]:
        """Return the clients whose devices can learn from corrections: those whose release has a person model."""
        return [client for client in clients if self.report(client)["person"] is not None]

    def speak(self, model: Path, clients: Sequence[str], on_tick: Tick = lambda: None) -> dict[str, Spoken]:
        """Start a server of the language model, and let each device ask it for a reply. Raises ChildFailed.

        The devices ran with consent to share their state (``shares_state``), so each sends the class and the rounded
        probability of its newest answer.
        """
        address_file = self._folder / "words.address"
        command: list[str | Path] = [self._cloud_python, *MODULE, "generate", "serve", model]
        command += ["--http", "127.0.0.1:0", "--port-file", address_file]
        server = self._family.start("words", command)
        address = self._family.wait_for_address(server, address_file, LISTENING_LIMIT_S)
        words = [SAID, "--server", f"http://{address}", "--seed", str(self._seed), "--json"]
        self._family.wait(
            *(self._talk(client, "reply", words) for client in clients), timeout_s=DEVICE_LIMIT_S, on_tick=on_tick
        )
        server.process.terminate()
        found = {client: self._read(client, ".reply.json") for client in clients}
        return {client: Spoken(SAID, each["sent"], each["reply"].strip()) for client, each in found.items()}

    def outcomes(self, made: Mapping[str, Sequence[Correction]], ratios: Sequence[float]) -> tuple[ClientOutcome, ...]:
        """Return what each client's device reported, with the corrections that were made."""
        return tuple(
            client_outcome(
                client,
                self.report(client),
                self._read(client, ".taught.json") if corrections else None,
                corrections,
                self._read(client, ".prototypes.json"),
                ratios,
            )
            for client, corrections in made.items()
        )

    def report(self, client: str) -> dict[str, Any]:
        """Return what the client's device reported when it was personalised."""
        return self._read(client, ".json")

    def _selection(self, client: str) -> set[str]:
        return set(self.report(client)["clips"]["selection"])

    def _run(
        self, data: Path, clients: Mapping[str, Sequence[str]], more: Sequence[str], ending: str, on_tick: Tick
    ) -> None:
        children = [
            self._device(
                data, client, "run", [*more, *self._consent, "--report", str(self._file(client, ending)), "--once"]
            )
            for client in clients
        ]
        self._family.wait(*children, timeout_s=DEVICE_LIMIT_S, on_tick=on_tick)

    def _talk(self, client: str, command: str, words: Sequence[str]) -> Child:
        """Start a command that reads or changes a device's state folder; its output goes to a file."""
        whole: list[str | Path] = [self._edge_python, *MODULE, "edge", command, "--state", self._folder / client]
        output = self._file(client, f".{command}.json")
        return self._family.start(f"{client} {command}", [*whole, *words], env=ONE_THREAD, output=output)

    def _read(self, client: str, ending: str) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self._file(client, ending).read_text())
        return parsed

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
        return self._family.start(f"{client} {command}", words, env=ONE_THREAD, output=output)

    def _file(self, client: str, ending: str) -> Path:
        return self._folder / f"{client}{ending}"
