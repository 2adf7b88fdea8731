"""Asks a server with KServe's own InferenceGRPCClient. It runs in an environment with kserve, without this project.

Usage: python ask_by_kserve.py HOST:PORT TASK PICTURE. Prints the answer as JSON.
"""

import asyncio
import json
import sys
from pathlib import Path

from kserve import InferenceGRPCClient, InferInput, InferRequest


async def ask(address: str, task: str, picture: bytes) -> dict[str, object]:
    client = InferenceGRPCClient(address)
    image = InferInput("image", [1], "BYTES")
    image._raw_data = len(picture).to_bytes(4, "little") + picture
    terms = {"latency_s": "30.5", "utility": 2}
    response = await client.infer(InferRequest(task, [image], parameters=terms, raw_inputs=[image._raw_data]))
    refusal = ""
    try:
        late = InferRequest(task, [image], parameters={"latency_s": "soon"}, raw_inputs=[image._raw_data])
        await client.infer(late)
    except Exception as error:  # the client raises gRPC's own error
        refusal = str(error)
    answer = {
        "ready": await client.is_model_ready(task),
        "live": await client.is_server_live(),
        "logits": response.outputs[0].as_numpy().tolist(),
        "parameters": response.to_rest()[0]["parameters"] if isinstance(response.to_rest(), tuple) else {},
        "refusal": refusal,
    }
    if not answer["parameters"]:
        answer["parameters"] = response.to_rest().get("parameters", {})
    await client.close()
    return answer


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes())), default=str))
