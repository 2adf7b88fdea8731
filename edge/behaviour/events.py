"""What happens to a device (events), and what its behaviour asks the runtime to do (actions)."""

from dataclasses import dataclass

from isthmus.proto.errors import IsthmusError
from isthmus.proto.limits import MAX_ROUNDS
from isthmus.proto.messages import JobStatus


@dataclass(frozen=True)
class Started:
    """The process started, with a fresh or a stored state. ``most_rounds``: uploads that the person allows."""

    most_rounds: int = MAX_ROUNDS


@dataclass(frozen=True)
class Enrolled:
    """The device has an identity. ``keeps``: the active student is sound under its pinned key.

    ``most_rounds``: uploads that the person allows; known at the latest now.
    """

    keeps: bool = False
    most_rounds: int = MAX_ROUNDS


@dataclass(frozen=True)
class Fetched:
    student_id: str


@dataclass(frozen=True)
class Verified:
    student_id: str


@dataclass(frozen=True)
class Judged:
    """The verified student was compared with the active one."""

    student_id: str
    accept: bool
    reason: str


@dataclass(frozen=True)
class Swapped:
    student_id: str


@dataclass(frozen=True)
class Damaged:
    """The active student is damaged on disk. ``substitute_id``: a sound one that can answer meanwhile, or ""."""

    student_id: str
    substitute_id: str


@dataclass(frozen=True)
class Repaired:
    """The damaged student was fetched again, is verified and in use."""

    student_id: str


@dataclass(frozen=True)
class Encoded:
    """The prototypes of ``round`` are in the outbox."""

    round: int


@dataclass(frozen=True)
class Accepted:
    """The cloud has the prototypes of ``round``."""

    round: int
    status: JobStatus


@dataclass(frozen=True)
class JobChanged:
    """The cloud reported the job's state. ``jitter`` is uniform in [0, 1)."""

    status: JobStatus
    jitter: float = 0.5


@dataclass(frozen=True)
class WatchEnded:
    """The stream closed before the job ended. ``jitter`` is uniform in [0, 1)."""

    jitter: float


@dataclass(frozen=True)
class Failed:
    """An action failed. ``jitter`` is uniform in [0, 1). ``progress``: bytes arrived before the failure."""

    error: IsthmusError
    jitter: float
    progress: bool = False


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Answered:
    """The cloud answered a clip."""


Event = (
    Started
    | Enrolled
    | Fetched
    | Verified
    | Judged
    | Swapped
    | Damaged
    | Repaired
    | Encoded
    | Accepted
    | JobChanged
    | WatchEnded
    | Failed
    | Tick
    | Answered
)


@dataclass(frozen=True)
class Enrol:
    pass


@dataclass(frozen=True)
class Fetch:
    """Bring every file of the student into the staging folder. "" means the newest student."""

    student_id: str


@dataclass(frozen=True)
class Verify:
    """Check sizes, hashes and signature of the fetched student, and that it runs."""

    student_id: str


@dataclass(frozen=True)
class Judge:
    """Compare the verified student with the active one, on the device's own clips."""

    old_id: str
    new_id: str


@dataclass(frozen=True)
class Swap:
    """Make the verified student the active one, atomically."""

    student_id: str


@dataclass(frozen=True)
class Repair:
    """Fetch the damaged student again, verify it, and make it the active one."""

    student_id: str


@dataclass(frozen=True)
class MakePrototypes:
    """Encode the selection clips with this student and put the prototypes of ``round`` into the outbox."""

    student_id: str
    round: int


@dataclass(frozen=True)
class Upload:
    """Send the outbox's prototypes of ``round``. An empty job id starts a job."""

    job_id: str
    round: int


@dataclass(frozen=True)
class Watch:
    """Follow the job; stop as soon as the agent asks for something else."""

    job_id: str


@dataclass(frozen=True)
class Wait:
    """Do nothing before ``until_s``, then report Tick."""

    until_s: float


@dataclass(frozen=True)
class Serve:
    """Personalisation has ended: answer clips as ``answering`` says."""


Action = Enrol | Fetch | Verify | Judge | Swap | Repair | MakePrototypes | Upload | Watch | Wait | Serve
