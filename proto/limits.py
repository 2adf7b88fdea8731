"""Bounds of the wire, checked before memory is allocated. Device and cloud both use them."""

from typing import Final

MAX_MESSAGE_BYTES: Final = 1 << 20
"""The largest gRPC message in either direction."""

CHUNK_BYTES: Final = 512 << 10
"""Payload of one chunk of a student's file."""

MAX_CLASSES: Final = 1_000
MAX_PROTOTYPE_ROWS: Final = 10_000
MAX_PROTOTYPE_VALUES: Final = 200_000
"""rows x (classes + feature values): 800 kB of float32, so a whole upload fits into one message."""

MAX_FEATURE_WIDTH: Final = 4_096
MAX_STUDENT_FILES: Final = 64
MAX_STUDENT_FILE_BYTES: Final = 1 << 30
MAX_STUDENT_BYTES: Final = 1 << 30
"""All files of one student together, and all its patches together."""

MAX_PATCH_PARTS: Final = 16_384
"""Spans and pieces in one patch."""

MAX_PERSON_MODEL_BYTES: Final = 512 << 10
"""Arrays of a person model, which travels inside the manifest: 28 classes of width 512 take 142 kB."""

MAX_KEY_CHANGES: Final = 64
"""Changes of the signing key that travel with a manifest."""

MAX_NAME_CHARS: Final = 64
MAX_CLASS_NAME_CHARS: Final = 256
"""Published label sets name a class by all its synonyms."""

MAX_ROUNDS: Final = 100

MAX_IMAGE_MESSAGE_BYTES: Final = 4 << 20
"""The largest message if elastic serving is on: one picture, or 64 small ones."""

MAX_IMAGES_PER_REQUEST: Final = 64
MAX_TASK_WEIGHTS_BYTES: Final = 64 << 20
MAX_TASKS: Final = 256
