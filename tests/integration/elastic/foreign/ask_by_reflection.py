"""Asks a server with grpc-requests, which knows only the answers of reflection.

Usage: python ask_by_reflection.py HOST:PORT TASK PICTURE. Prints the answer as JSON. It runs without this project.
"""

import base64
import json
import sys
from pathlib import Path

from grpc_requests import Client

address, task, picture = sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes()
client = Client.get_by_endpoint(address)
size = len(picture).to_bytes(4, "little")
inferred = client.request(
    "inference.GRPCInferenceService",
    "ModelInfer",
    {
        "model_name": task,
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}],
        "raw_input_contents": [base64.b64encode(size + picture).decode()],
        "parameters": {"latency_s": {"string_param": "30.5"}},
    },
)
made = client.request(
    "isthmus.v1.ElasticService",
    "MakeQuery",
    {"task": task, "encoded": base64.b64encode(picture).decode(), "latency_s": 30.0},
)
print(json.dumps({"services": client.service_names, "inferred": inferred, "made": made}))
