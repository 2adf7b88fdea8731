"""The version of protobuf: Triton's client cannot be installed beside the newest that isthmus admits."""

from importlib.metadata import version

TOO_NEW_FOR_TRITON = int(version("protobuf").partition(".")[0]) >= 7
WHY = "tritonclient needs protobuf < 7"
