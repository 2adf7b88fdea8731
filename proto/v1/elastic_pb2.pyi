from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PromptMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROMPT_MODE_UNSPECIFIED: _ClassVar[PromptMode]
    PROMPT_MODE_APPEND: _ClassVar[PromptMode]
    PROMPT_MODE_REPLACE: _ClassVar[PromptMode]
PROMPT_MODE_UNSPECIFIED: PromptMode
PROMPT_MODE_APPEND: PromptMode
PROMPT_MODE_REPLACE: PromptMode

class TaskDescription(_message.Message):
    __slots__ = ("name", "classes", "prompt_mode", "accuracy", "default_latency_s", "default_utility")
    class AccuracyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_MODE_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_UTILITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    classes: _containers.RepeatedScalarFieldContainer[str]
    prompt_mode: PromptMode
    accuracy: _containers.ScalarMap[int, float]
    default_latency_s: float
    default_utility: float
    def __init__(self, name: _Optional[str] = ..., classes: _Optional[_Iterable[str]] = ..., prompt_mode: _Optional[_Union[PromptMode, str]] = ..., accuracy: _Optional[_Mapping[int, float]] = ..., default_latency_s: _Optional[float] = ..., default_utility: _Optional[float] = ...) -> None: ...

class WeightsChunk(_message.Message):
    __slots__ = ("offset_bytes", "data", "crc32")
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    offset_bytes: int
    data: bytes
    crc32: int
    def __init__(self, offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class RegisterTaskRequest(_message.Message):
    __slots__ = ("opening", "chunk")
    class Opening(_message.Message):
        __slots__ = ("task", "weights_bytes", "weights_sha256")
        TASK_FIELD_NUMBER: _ClassVar[int]
        WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
        WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
        task: TaskDescription
        weights_bytes: int
        weights_sha256: bytes
        def __init__(self, task: _Optional[_Union[TaskDescription, _Mapping]] = ..., weights_bytes: _Optional[int] = ..., weights_sha256: _Optional[bytes] = ...) -> None: ...
    OPENING_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    opening: RegisterTaskRequest.Opening
    chunk: WeightsChunk
    def __init__(self, opening: _Optional[_Union[RegisterTaskRequest.Opening, _Mapping]] = ..., chunk: _Optional[_Union[WeightsChunk, _Mapping]] = ...) -> None: ...

class RegisterTaskResponse(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: RegisteredTask
    def __init__(self, task: _Optional[_Union[RegisteredTask, _Mapping]] = ...) -> None: ...

class RegisteredTask(_message.Message):
    __slots__ = ("description", "version", "prompted_gammas", "measured")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROMPTED_GAMMAS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    description: TaskDescription
    version: int
    prompted_gammas: _containers.RepeatedScalarFieldContainer[int]
    measured: MeasuredAccuracy
    def __init__(self, description: _Optional[_Union[TaskDescription, _Mapping]] = ..., version: _Optional[int] = ..., prompted_gammas: _Optional[_Iterable[int]] = ..., measured: _Optional[_Union[MeasuredAccuracy, _Mapping]] = ...) -> None: ...

class MeasuredAccuracy(_message.Message):
    __slots__ = ("accuracy", "pictures", "used")
    class AccuracyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    accuracy: _containers.ScalarMap[int, float]
    pictures: int
    used: bool
    def __init__(self, accuracy: _Optional[_Mapping[int, float]] = ..., pictures: _Optional[int] = ..., used: _Optional[bool] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTasksResponse(_message.Message):
    __slots__ = ("tasks", "image_px")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_PX_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[RegisteredTask]
    image_px: int
    def __init__(self, tasks: _Optional[_Iterable[_Union[RegisteredTask, _Mapping]]] = ..., image_px: _Optional[int] = ...) -> None: ...

class RemoveTaskRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveTaskResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pixels(_message.Message):
    __slots__ = ("rgb", "height", "width")
    RGB_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    rgb: bytes
    height: int
    width: int
    def __init__(self, rgb: _Optional[bytes] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class MakeQueryRequest(_message.Message):
    __slots__ = ("task", "encoded", "pixels", "latency_s", "utility", "gamma", "min_accuracy")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    UTILITY_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    MIN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    task: str
    encoded: bytes
    pixels: Pixels
    latency_s: float
    utility: float
    gamma: int
    min_accuracy: float
    def __init__(self, task: _Optional[str] = ..., encoded: _Optional[bytes] = ..., pixels: _Optional[_Union[Pixels, _Mapping]] = ..., latency_s: _Optional[float] = ..., utility: _Optional[float] = ..., gamma: _Optional[int] = ..., min_accuracy: _Optional[float] = ...) -> None: ...

class MakeQueryResponse(_message.Message):
    __slots__ = ("class_index", "class_name", "logits", "gamma", "queue_s", "run_s", "in_time", "experts")
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    RUN_S_FIELD_NUMBER: _ClassVar[int]
    IN_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    class_index: int
    class_name: str
    logits: _containers.RepeatedScalarFieldContainer[float]
    gamma: int
    queue_s: float
    run_s: float
    in_time: bool
    experts: int
    def __init__(self, class_index: _Optional[int] = ..., class_name: _Optional[str] = ..., logits: _Optional[_Iterable[float]] = ..., gamma: _Optional[int] = ..., queue_s: _Optional[float] = ..., run_s: _Optional[float] = ..., in_time: _Optional[bool] = ..., experts: _Optional[int] = ...) -> None: ...
