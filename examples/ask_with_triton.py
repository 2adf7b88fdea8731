"""Ask the service with Triton's own client, unchanged, over the Open Inference Protocol.

    pip install 'tritonclient[grpc]'
    isthmus cloud serve --elastic-model FILE --state DIR --listen 127.0.0.1:8001   # in another shell
    isthmus elastic register TASK.json --server 127.0.0.1:8001
    python examples/ask_with_triton.py 127.0.0.1:8001 TASK picture.jpg [picture.jpg ...]

Each picture is sent as the bytes of its file. ``latency_s`` asks for the answer within two seconds: while many
callers wait, the service answers with fewer tokens rather than late.
"""

import argparse
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT of the service")
    parser.add_argument("task", help="name of a registered task; to Triton's client it is a model")
    parser.add_argument("pictures", nargs="+", type=Path, help="JPEG or PNG files")
    chosen = parser.parse_args()

    files_N = np.array([path.read_bytes() for path in chosen.pictures], dtype=np.object_)
    image = triton.InferInput("image", [len(files_N)], "BYTES")
    image.set_data_from_numpy(files_N)
    with triton.InferenceServerClient(chosen.address) as client:
        if not client.is_model_ready(chosen.task):
            known = client.get_model_repository_index(as_json=True).get("models", [])
            names = ", ".join(model["name"] for model in known) or "none"
            parser.exit(1, f"the service has no task '{chosen.task}'; its tasks: {names}\n")
        result = client.infer(chosen.task, [image], parameters={"latency_s": 2.0})
    gamma = result.get_response().parameters["gamma"].int64_param
    for path, label in zip(chosen.pictures, result.as_numpy("label"), strict=True):
        print(f"{path.name}: {label.decode()} (gamma {gamma})")


if __name__ == "__main__":
    main()
