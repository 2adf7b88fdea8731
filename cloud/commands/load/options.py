"""The options of ``isthmus cloud load``. Free of the libraries that send, so that help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from isthmus.command_line import check_fields


@dataclass(frozen=True)
class Load:
    """What to send, to whom, and how much."""

    server: Annotated[str, Option(help="Address of a running 'isthmus cloud serve', HOST:PORT.")]
    what: Annotated[
        Literal["query", "device", "frames"],
        Option(
            help="query: images to elastic serving. device: control calls of enrolled devices. frames: devices' "
            "features, over one stream per connection."
        ),
    ] = "query"
    task: Annotated[str | None, Option(help="With --what query: name of a registered task.")] = None
    image: Annotated[Path | None, Option(help="With --what query: a JPEG or PNG file that every query sends.")] = None
    data: Annotated[
        Path | None,
        Option(
            help="With --what query, in place of --image: labelled pictures (Parquet). Every query sends the next one, "
            "and right answers are counted. Take pictures on which no profile was measured."
        ),
    ] = None
    recipe: Annotated[
        str | None,
        Option(help="With --data: cifar10, animals-vehicles, animals or a JSON file, which maps labels to classes."),
    ] = None
    pictures: Annotated[int, Option(min=1, max=100_000, help="With --data: read this many pictures.")] = 1_000
    rate: Annotated[
        str, Option(help="Open loop: calls per second, sent whatever the answers. Several rates: 50,100,200.")
    ] = ""
    in_flight: Annotated[
        str, Option(help="Closed loop: number of calls always under way. Several numbers: 1,8,64,512.")
    ] = ""
    trace: Annotated[
        Path | None,
        Option(help="Recorded arrivals (CSV), sped up or slowed down to --rate. Default: a Poisson process."),
    ] = None
    duration_s: Annotated[float, Option(min=0.01, help="Seconds of load per rate or number in flight.")] = 10.0
    deadline_ms: Annotated[
        float, Option(min=0.1, help="An answer within this time is good. A query is sent with it as its latency.")
    ] = 1_000.0
    timeout_s: Annotated[float, Option(min=0.01, help="Seconds after which a call is given up.")] = 20.0
    connections: Annotated[int, Option(min=1, max=4_096, help="Number of connections, each its own device.")] = 8
    echo: Annotated[
        bool, Option("--echo", help="Send the same load to a bare echo server too, to see what gRPC alone can do.")
    ] = False
    key_file: Annotated[
        Path | None, Option(help="File with the key that the server asks for: of elastic serving, or to enrol.")
    ] = None
    tls_cert: Annotated[
        Path | None, Option(help="PEM certificate to trust. Without one the connection is not encrypted.")
    ] = None
    seed: Annotated[int, Option(min=0, help="Seed of the Poisson process.")] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.rate and not self.in_flight:
            raise ValueError("give --rate (open loop), --in-flight (closed loop) or both")
        if self.trace is not None and not self.rate:
            raise ValueError("--trace needs --rate")
