"""The settings of generation: options of ``isthmus generate serve``, and with a prefix of ``isthmus cloud serve``.

Free of the libraries that serve, so that help is fast.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from isthmus.cloud.cluster.connection import check_name
from isthmus.command_line import check_fields

NumberType = Annotated[Literal["float32", "bfloat16"], Option(help="Number type of the language model's weights.")]
Layout = Annotated[
    Literal["slots", "paged", "padded"],
    Option(help="Layout of the KV cache: a slot per request, blocks with tables, or padded rows."),
]
Rows = Annotated[int, Option(min=1, help="Requests that may have tokens in the KV cache.")]
KVTokens = Annotated[int, Option(min=16, help="Tokens that the KV cache holds, over all requests.")]


@dataclass(frozen=True)
class GenerationSettings:
    """A language model of ours, or other servers as its replicas, and how they are served.

    Raises ValueError for settings that do not go together, and for a policy that only serves comparisons.

    >>> GenerationSettings(model=Path("model"), cache=Path("rules.json")).layout
    'slots'
    >>> GenerationSettings(upstream_key_file=Path("key"))
    Traceback (most recent call last):
        ...
    ValueError: ...
    """

    model: Annotated[
        Path | None,
        Option(
            help="Stream replies of this language model: a model directory as Hugging Face publishes them, or one that "
            "'isthmus generate convert' wrote."
        ),
    ] = None
    replicas: Annotated[
        int,
        Option(
            min=1,
            max=64,
            help="Copies of the language model, each with its own KV cache. The freest one gets the next request. "
            "Several need --executor process or ray.",
        ),
    ] = 1
    executor: Annotated[
        str,
        Option(
            help="Where replicas run: 'thread' in the server's process, 'process' in processes of their own, 'ray' on "
            "a Ray cluster that the server starts on this machine, 'ray://HOST:PORT' on one that runs. One that dies "
            "is started again, and its requests go on at another one."
        ),
    ] = "thread"
    upstream: Annotated[
        list[str] | None,
        Option(
            "--generate-upstream",
            help="Address of another server with OpenAI's interface, such as http://127.0.0.1:8001, which computes in "
            "place of a model of ours. Repeat it for several replicas of one model.",
        ),
    ] = None
    upstream_model: Annotated[
        str | None, Option(help="Name of the model at the upstream servers. Default: the one that each lists.")
    ] = None
    upstream_key_file: Annotated[Path | None, Option(help="File with the API key for the upstream servers.")] = None
    upstream_move_key_file: Annotated[
        Path | None,
        Option(
            help="File with the key by which running requests are moved between upstream servers that are ours (their "
            "--move-key-file), when one is drained. Default: they end where they began."
        ),
    ] = None
    drained: Annotated[
        Path | None,
        Option(
            help="File with addresses of upstream servers, or names of replicas (replica-1, replica-2, ...), one per "
            "line, that get no new requests. SIGHUP reads it again."
        ),
    ] = None
    cache: Annotated[
        Path | None,
        Option(
            help="JSON file with rules by class of request (the field 'kind'): threshold, floor, lifetime_s, quota, "
            "shared. Greedy answers of these classes are kept and given again. Default: nothing is kept."
        ),
    ] = None
    cache_embedder: Annotated[
        Path | None,
        Option(
            help="Model directory of a BERT-shaped sentence encoder. With it, questions that mean the same are found "
            "in the cache, too."
        ),
    ] = None
    name: Annotated[
        str | None, Option(help="Name of the language model for clients. Default: that of its directory.")
    ] = None
    key_file: Annotated[
        Path | None,
        Option(help="File with the API key that clients of the language model must send. Default: everyone is served."),
    ] = None
    move_key_file: Annotated[
        Path | None,
        Option(
            help="File with the key that a front must send to move running requests from and to this server. Whoever "
            "has it can read them. Default: nothing is moved."
        ),
    ] = None
    profile: Annotated[
        Path | None,
        Option(help="Profile that 'isthmus generate profile' wrote. Default: a brief measurement at the start."),
    ] = None
    policy: Annotated[
        str, Option(help="Scheduling policy: fused, orca, baton, sjf, srpt, hrrn, vtc, paced or jitserve.")
    ] = "fused"
    layout: Layout = "slots"
    number_type: NumberType = "float32"
    device: Annotated[str, Option(help="Where the language model runs: cpu or cuda.")] = "cpu"
    threads: Annotated[int, Option(min=1, help="CPU threads of the language model.")] = 1
    rows: Rows = 32
    kv_tokens: KVTokens = 16_384
    swap_tokens: Annotated[
        int,
        Option(
            min=0,
            help="Tokens of preempted requests that are kept beside the KV cache, by a thread of their own. 0: they "
            "are computed again.",
        ),
    ] = 0
    swap_folder: Annotated[
        Path | None,
        Option(help="Folder for them, as files that are mapped into memory. Default: in memory.", file_okay=False),
    ] = None
    prefix_tokens: Annotated[
        int,
        Option(
            min=0,
            help="Tokens of prompts' beginnings (system prompts, earlier turns) that stay in the KV cache for requests "
            "that begin alike. Needs the layout 'paged'. 0: every request computes its whole prompt.",
        ),
    ] = 0
    max_tokens: Annotated[int, Option(min=1, help="Longest answer that a client may ask for.")] = 1_024
    max_waiting: Annotated[
        int, Option(min=1, help="Requests for text that may be under way. Further requests are refused.")
    ] = 256

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model is not None and self.upstream:
            raise ValueError("a model of ours or upstream servers answer, not both: leave one out")
        if self.cache_embedder is not None and self.cache is None:
            raise ValueError("an embedder finds answers in the cache; give the cache's rules, too")
        if self.move_key_file is not None and self.model is None:
            raise ValueError("a key for moves is for a model of ours; upstream servers have their own")
        check_name(self.executor)
        if self.hosted and self.model is None:
            raise ValueError("replicas are of a model of ours: give a model directory, or leave --executor out")
        if self.replicas > 1 and not self.hosted:
            raise ValueError("several replicas need --executor process, or ray")
        if self.hosted and self.move_key_file is not None:
            raise ValueError("replicas move requests among themselves without a key for moves; leave it out")
        if self.drained is not None and not (self.upstream or self.hosted):
            raise ValueError("nothing can be drained: give upstream servers, or replicas with --executor")
        of_upstream = (self.upstream_model, self.upstream_key_file, self.upstream_move_key_file)
        if any(each is not None for each in of_upstream) and not self.upstream:
            raise ValueError("settings of upstream servers were given, but no upstream server")
        if self.policy in ("static", "magnus"):
            raise ValueError(f"the policy '{self.policy}' computes rows that nobody needs; it is for simulations alone")
        if self.swap_tokens and self.layout != "slots":
            raise ValueError("only the layout 'slots' can be swapped; leave the swap pool out, or give that layout")
        if self.prefix_tokens and (self.layout != "paged" or self.policy == "baton"):
            raise ValueError("only the layout 'paged' shares beginnings of prompts, and not with the policy 'baton'")
        if self.swap_folder is not None and not self.swap_tokens:
            raise ValueError("a folder for the swap pool needs the pool's number of tokens, too")

    @property
    def hosted(self) -> bool:
        """Whether the model runs in replicas of their own, outside the server's process."""
        return self.executor != "thread"

    @property
    def served(self) -> bool:
        """Whether anything answers."""
        return self.model is not None or bool(self.upstream)
