"""Regenerate the protobuf code under proto/: ``python -m isthmus.proto.generate [--check]``.

The compiler gets the virtual path ``isthmus/proto=proto``, so the generated code imports as
``isthmus.proto.v1.isthmus_pb2``. The output is committed; ``--check`` compares it with a fresh run and fails on any
difference. The code of a published protocol gets its own descriptor pool: clients of that protocol register the same
names in the process's pool, which accepts every name once. Needs grpcio-tools (extra ``dev``). Its version is pinned
because it decides the oldest protobuf that can run the code.
"""

import argparse
import importlib.resources
import sys
import tempfile
from pathlib import Path

PROTO_DIR = Path(__file__).resolve().parent
IMPORT_ROOT = "isthmus/proto"
SOURCES = ("v1/isthmus.proto", "v1/elastic.proto", "open_inference/inference.proto")
OWN_POOL = ("open_inference/inference_pb2.py",)


class GenerationError(Exception):
    """The compiler is missing, or it refused a source."""


def compile_sources(out_dir: Path) -> dict[str, bytes]:
    """Run protoc into ``out_dir`` and return the generated files by their path relative to proto/.

    Raises GenerationError if grpcio-tools is not installed or a source does not compile.
    """
    try:
        from grpc_tools import protoc
    except ModuleNotFoundError as error:
        raise GenerationError("grpcio-tools is not installed: pip install 'isthmus[dev]'") from error
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{IMPORT_ROOT}={PROTO_DIR}",
            f"-I{well_known}",
            f"--python_out={out_dir}",
            f"--pyi_out={out_dir}",
            f"--grpc_python_out={out_dir}",
            *(f"{IMPORT_ROOT}/{source}" for source in SOURCES),
        ]
    )
    if code != 0:
        raise GenerationError(f"protoc ended with {code}")
    root = out_dir / IMPORT_ROOT
    made = {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    return made | {name: _in_own_pool(made[name]) for name in OWN_POOL}


def _in_own_pool(code: bytes) -> bytes:
    shared = b"_descriptor_pool.Default()"
    if code.count(shared) != 1:
        raise GenerationError("the compiler writes its descriptor pool differently from before; adapt _in_own_pool")
    return code.replace(shared, b"_descriptor_pool.DescriptorPool()")


def stale_files(fresh: dict[str, bytes], proto_dir: Path = PROTO_DIR) -> list[str]:
    """Return the names of generated files that are absent from ``proto_dir`` or differ from ``fresh``."""
    return [
        name
        for name, content in fresh.items()
        if not (proto_dir / name).is_file() or (proto_dir / name).read_bytes() != content
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m isthmus.proto.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed code is stale")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            fresh = compile_sources(Path(scratch))
        except GenerationError as error:
            print(f"isthmus.proto.generate: {error}", file=sys.stderr)
            return 1
    stale = stale_files(fresh)
    if arguments.check:
        for name in stale:
            print(f"proto/{name} is stale: run python -m isthmus.proto.generate", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (PROTO_DIR / name).write_bytes(fresh[name])
        print(f"wrote proto/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
