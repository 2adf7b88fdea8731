"""Asks a server with KServe's own InferenceRESTClient. It runs in an environment with kserve, without this project.

Usage: python ask_by_kserve_rest.py HOST:PORT TASK PICTURE. Prints the answers as JSON: with binary data, and as JSON.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from PIL import Image


async def ask(address: str, task: str, picture: Path) -> dict[str, object]:
    base = f"http://{address}"
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=120))
    pixels_NHWC = np.asarray(Image.open(picture))[None]
    answers = []
    for binary in (True, False):
        given = InferInput("pixels", list(pixels_NHWC.shape), "UINT8")
        given.set_data_from_numpy(pixels_NHWC, binary_data=binary)
        request = InferRequest(task, [given], parameters={"latency_s": "30.5", "gamma": 0}, request_outputs=[])
        response = await client.infer(base, request, model_name=task)
        answers.append({"logits": response.outputs[0].as_numpy().tolist(), "parameters": response.parameters})
    refusal = ""
    try:
        late = InferRequest(task, [given], parameters={"latency_s": "soon"})
        await client.infer(base, late, model_name=task)
    except Exception as error:  # the client raises httpx's own error
        refusal = f"{error} {getattr(getattr(error, 'response', None), 'text', '')}"
    found = {
        "live": await client.is_server_live(base),
        "ready": await client.is_server_ready(base),
        "model_ready": await client.is_model_ready(base, task),
        "answers": answers,
        "refusal": refusal,
    }
    await client.close()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(sys.argv[1], sys.argv[2], Path(sys.argv[3]))), default=str))
