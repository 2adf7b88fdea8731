from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("device_name", "enrolment_key")
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    ENROLMENT_KEY_FIELD_NUMBER: _ClassVar[int]
    device_name: str
    enrolment_key: str
    def __init__(self, device_name: _Optional[str] = ..., enrolment_key: _Optional[str] = ...) -> None: ...

class EnrolResponse(_message.Message):
    __slots__ = ("device_id", "token", "signing_public_key", "classes", "input_spec_json", "feature_width", "rounds")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIGNING_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    INPUT_SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    FEATURE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    token: str
    signing_public_key: bytes
    classes: _containers.RepeatedScalarFieldContainer[str]
    input_spec_json: str
    feature_width: int
    rounds: int
    def __init__(self, device_id: _Optional[str] = ..., token: _Optional[str] = ..., signing_public_key: _Optional[bytes] = ..., classes: _Optional[_Iterable[str]] = ..., input_spec_json: _Optional[str] = ..., feature_width: _Optional[int] = ..., rounds: _Optional[int] = ...) -> None: ...

class Prototypes(_message.Message):
    __slots__ = ("values", "rows", "classes", "sizes", "mode", "min_cluster", "epsilon", "features", "feature_values")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[Prototypes.Mode]
        MODE_PROTOTYPES: _ClassVar[Prototypes.Mode]
        MODE_PROBABILITIES: _ClassVar[Prototypes.Mode]
        MODE_FEATURES: _ClassVar[Prototypes.Mode]
    MODE_UNSPECIFIED: Prototypes.Mode
    MODE_PROTOTYPES: Prototypes.Mode
    MODE_PROBABILITIES: Prototypes.Mode
    MODE_FEATURES: Prototypes.Mode
    VALUES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MIN_CLUSTER_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    FEATURE_VALUES_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    rows: int
    classes: int
    sizes: _containers.RepeatedScalarFieldContainer[int]
    mode: Prototypes.Mode
    min_cluster: int
    epsilon: float
    features: bytes
    feature_values: int
    def __init__(self, values: _Optional[bytes] = ..., rows: _Optional[int] = ..., classes: _Optional[int] = ..., sizes: _Optional[_Iterable[int]] = ..., mode: _Optional[_Union[Prototypes.Mode, str]] = ..., min_cluster: _Optional[int] = ..., epsilon: _Optional[float] = ..., features: _Optional[bytes] = ..., feature_values: _Optional[int] = ...) -> None: ...

class StartPersonalisationRequest(_message.Message):
    __slots__ = ("idempotency_key", "prototypes", "rounds", "seed")
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    PROTOTYPES_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    idempotency_key: str
    prototypes: Prototypes
    rounds: int
    seed: int
    def __init__(self, idempotency_key: _Optional[str] = ..., prototypes: _Optional[_Union[Prototypes, _Mapping]] = ..., rounds: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class StartPersonalisationResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: JobStatus
    def __init__(self, job: _Optional[_Union[JobStatus, _Mapping]] = ...) -> None: ...

class UploadPrototypesRequest(_message.Message):
    __slots__ = ("job_id", "round", "prototypes")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PROTOTYPES_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    round: int
    prototypes: Prototypes
    def __init__(self, job_id: _Optional[str] = ..., round: _Optional[int] = ..., prototypes: _Optional[_Union[Prototypes, _Mapping]] = ...) -> None: ...

class UploadPrototypesResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: JobStatus
    def __init__(self, job: _Optional[_Union[JobStatus, _Mapping]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: JobStatus
    def __init__(self, job: _Optional[_Union[JobStatus, _Mapping]] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("job_id", "stage", "round", "rounds", "epoch", "epochs", "progress", "eta_s", "student_id", "selected_per_class", "stage_seconds", "error", "settled")
    class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STAGE_UNSPECIFIED: _ClassVar[JobStatus.Stage]
        STAGE_QUEUED: _ClassVar[JobStatus.Stage]
        STAGE_SELECTING: _ClassVar[JobStatus.Stage]
        STAGE_DISTILLING: _ClassVar[JobStatus.Stage]
        STAGE_AWAITING_PROTOTYPES: _ClassVar[JobStatus.Stage]
        STAGE_COMPRESSING: _ClassVar[JobStatus.Stage]
        STAGE_EXPORTING: _ClassVar[JobStatus.Stage]
        STAGE_READY: _ClassVar[JobStatus.Stage]
        STAGE_FAILED: _ClassVar[JobStatus.Stage]
    STAGE_UNSPECIFIED: JobStatus.Stage
    STAGE_QUEUED: JobStatus.Stage
    STAGE_SELECTING: JobStatus.Stage
    STAGE_DISTILLING: JobStatus.Stage
    STAGE_AWAITING_PROTOTYPES: JobStatus.Stage
    STAGE_COMPRESSING: JobStatus.Stage
    STAGE_EXPORTING: JobStatus.Stage
    STAGE_READY: JobStatus.Stage
    STAGE_FAILED: JobStatus.Stage
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    STUDENT_ID_FIELD_NUMBER: _ClassVar[int]
    SELECTED_PER_CLASS_FIELD_NUMBER: _ClassVar[int]
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    stage: JobStatus.Stage
    round: int
    rounds: int
    epoch: int
    epochs: int
    progress: float
    eta_s: float
    student_id: str
    selected_per_class: _containers.RepeatedScalarFieldContainer[int]
    stage_seconds: _containers.ScalarMap[str, float]
    error: str
    settled: bool
    def __init__(self, job_id: _Optional[str] = ..., stage: _Optional[_Union[JobStatus.Stage, str]] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., epoch: _Optional[int] = ..., epochs: _Optional[int] = ..., progress: _Optional[float] = ..., eta_s: _Optional[float] = ..., student_id: _Optional[str] = ..., selected_per_class: _Optional[_Iterable[int]] = ..., stage_seconds: _Optional[_Mapping[str, float]] = ..., error: _Optional[str] = ..., settled: _Optional[bool] = ...) -> None: ...

class DescribeStudentRequest(_message.Message):
    __slots__ = ("student_id", "offered")
    STUDENT_ID_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    student_id: str
    offered: bool
    def __init__(self, student_id: _Optional[str] = ..., offered: _Optional[bool] = ...) -> None: ...

class StudentFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256", "patch")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: bytes
    patch: StudentPatch
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., patch: _Optional[_Union[StudentPatch, _Mapping]] = ...) -> None: ...

class StudentPatch(_message.Message):
    __slots__ = ("base_sha256", "size_bytes", "sha256")
    BASE_SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    base_sha256: bytes
    size_bytes: int
    sha256: bytes
    def __init__(self, base_sha256: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class PublicMeasure(_message.Message):
    __slots__ = ("clips", "accuracy", "atc_threshold", "class_shares", "ratio_accuracies")
    CLIPS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ATC_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CLASS_SHARES_FIELD_NUMBER: _ClassVar[int]
    RATIO_ACCURACIES_FIELD_NUMBER: _ClassVar[int]
    clips: int
    accuracy: float
    atc_threshold: float
    class_shares: _containers.RepeatedScalarFieldContainer[float]
    ratio_accuracies: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, clips: _Optional[int] = ..., accuracy: _Optional[float] = ..., atc_threshold: _Optional[float] = ..., class_shares: _Optional[_Iterable[float]] = ..., ratio_accuracies: _Optional[_Iterable[float]] = ...) -> None: ...

class PersonModel(_message.Message):
    __slots__ = ("weights", "bias", "centre", "spread", "mean", "between", "within", "fusion", "people")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    CENTRE_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    BETWEEN_FIELD_NUMBER: _ClassVar[int]
    WITHIN_FIELD_NUMBER: _ClassVar[int]
    FUSION_FIELD_NUMBER: _ClassVar[int]
    PEOPLE_FIELD_NUMBER: _ClassVar[int]
    weights: bytes
    bias: bytes
    centre: bytes
    spread: bytes
    mean: bytes
    between: bytes
    within: bytes
    fusion: float
    people: int
    def __init__(self, weights: _Optional[bytes] = ..., bias: _Optional[bytes] = ..., centre: _Optional[bytes] = ..., spread: _Optional[bytes] = ..., mean: _Optional[bytes] = ..., between: _Optional[bytes] = ..., within: _Optional[bytes] = ..., fusion: _Optional[float] = ..., people: _Optional[int] = ...) -> None: ...

class StudentManifest(_message.Message):
    __slots__ = ("student_id", "kind", "files", "ratios", "classes", "input_spec_json", "feature_width", "created_s", "measured", "person", "version", "expires_s", "device_id", "release")
    STUDENT_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    RATIOS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    INPUT_SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    FEATURE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    PERSON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    student_id: str
    kind: str
    files: _containers.RepeatedCompositeFieldContainer[StudentFile]
    ratios: _containers.RepeatedScalarFieldContainer[float]
    classes: _containers.RepeatedScalarFieldContainer[str]
    input_spec_json: str
    feature_width: int
    created_s: float
    measured: PublicMeasure
    person: PersonModel
    version: int
    expires_s: float
    device_id: str
    release: str
    def __init__(self, student_id: _Optional[str] = ..., kind: _Optional[str] = ..., files: _Optional[_Iterable[_Union[StudentFile, _Mapping]]] = ..., ratios: _Optional[_Iterable[float]] = ..., classes: _Optional[_Iterable[str]] = ..., input_spec_json: _Optional[str] = ..., feature_width: _Optional[int] = ..., created_s: _Optional[float] = ..., measured: _Optional[_Union[PublicMeasure, _Mapping]] = ..., person: _Optional[_Union[PersonModel, _Mapping]] = ..., version: _Optional[int] = ..., expires_s: _Optional[float] = ..., device_id: _Optional[str] = ..., release: _Optional[str] = ...) -> None: ...

class KeyChange(_message.Message):
    __slots__ = ("previous_key", "next_key", "changed_s")
    PREVIOUS_KEY_FIELD_NUMBER: _ClassVar[int]
    NEXT_KEY_FIELD_NUMBER: _ClassVar[int]
    CHANGED_S_FIELD_NUMBER: _ClassVar[int]
    previous_key: bytes
    next_key: bytes
    changed_s: float
    def __init__(self, previous_key: _Optional[bytes] = ..., next_key: _Optional[bytes] = ..., changed_s: _Optional[float] = ...) -> None: ...

class SignedKeyChange(_message.Message):
    __slots__ = ("change", "previous_signature", "next_signature")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NEXT_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    change: bytes
    previous_signature: bytes
    next_signature: bytes
    def __init__(self, change: _Optional[bytes] = ..., previous_signature: _Optional[bytes] = ..., next_signature: _Optional[bytes] = ...) -> None: ...

class DescribeStudentResponse(_message.Message):
    __slots__ = ("manifest", "signature", "key_changes")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KEY_CHANGES_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    signature: bytes
    key_changes: _containers.RepeatedCompositeFieldContainer[SignedKeyChange]
    def __init__(self, manifest: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., key_changes: _Optional[_Iterable[_Union[SignedKeyChange, _Mapping]]] = ...) -> None: ...

class FetchStudentRequest(_message.Message):
    __slots__ = ("student_id", "file_name", "offset_bytes")
    STUDENT_ID_FIELD_NUMBER: _ClassVar[int]
    FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    student_id: str
    file_name: str
    offset_bytes: int
    def __init__(self, student_id: _Optional[str] = ..., file_name: _Optional[str] = ..., offset_bytes: _Optional[int] = ...) -> None: ...

class FetchStudentResponse(_message.Message):
    __slots__ = ("offset_bytes", "data", "crc32")
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    offset_bytes: int
    data: bytes
    crc32: int
    def __init__(self, offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForgetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("sequence", "frame")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    frame: bytes
    def __init__(self, sequence: _Optional[int] = ..., frame: _Optional[bytes] = ...) -> None: ...

class InferError(_message.Message):
    __slots__ = ("code", "message", "retryable")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retryable: bool
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class InferResponse(_message.Message):
    __slots__ = ("sequence", "probabilities", "error", "server_ms")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SERVER_MS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    error: InferError
    server_ms: float
    def __init__(self, sequence: _Optional[int] = ..., probabilities: _Optional[_Iterable[float]] = ..., error: _Optional[_Union[InferError, _Mapping]] = ..., server_ms: _Optional[float] = ...) -> None: ...
