"""Serve images with a timm model: start the service, register a task, and ask it from Python.

    python examples/serve_timm_images.py                        # random weights: no download
    python examples/serve_timm_images.py --model FILE --pixels imagenet   # your checkpoint (safetensors, timm's names)

At its first start the service measures this machine: how long each number of tokens and each batch size takes. Then
the head of the checkpoint is registered as a task, and three pictures are classified. Random weights give random
answers; the point is the path. From a shell, ``isthmus cloud serve --elastic-model FILE`` starts the same service.
"""

import argparse
import asyncio
import io
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
from PIL import Image

from isthmus import CloudSettings, ElasticClient, Server, TaskSpec, TaskWeights, load_vit


def random_checkpoint(folder: Path) -> Path:
    """timm's ViT-Tiny with random weights and a head of three classes, cut to two blocks so that it runs in seconds."""
    vit = load_vit("vit_tiny_patch16_224", random=True)
    vit.blocks = vit.blocks[:2]
    vit.reset_classifier(3)
    path = folder / "vit.safetensors"
    safetensors.torch.save_file(vit.state_dict(), path)
    return path


def own_head(checkpoint: Path) -> tuple[TaskSpec, bytes]:
    """The checkpoint's own classifier as a task without prompts."""
    tensors = safetensors.numpy.load_file(checkpoint)
    weight_CD, bias_C = tensors["head.weight"], tensors["head.bias"]
    classes = tuple(f"class {index}" for index in range(len(bias_C)))
    return TaskSpec("own", classes, default_latency_s=5.0), TaskWeights(weight_CD, bias_C, {}).to_bytes()


def picture(seed: int) -> bytes:
    """A JPEG file of random colours."""
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (224, 224, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG")
    return buffer.getvalue()


def ask(address: str, checkpoint: Path) -> None:
    with ElasticClient.connect(address) as client:
        registered = client.register(*own_head(checkpoint))
        print(f"task '{registered.description.name}' has {len(registered.description.classes)} classes")
        for seed in range(3):
            reply = client.query("own", picture(seed), latency_s=2.0)
            print(f"picture {seed}: {reply.class_name}, gamma {reply.gamma}, ran {1e3 * reply.run_s:.1f} ms")


async def serve(checkpoint: Path, pixels: str, state: Path) -> None:
    settings = CloudSettings(state=state, elastic_model=str(checkpoint), elastic_pixels=pixels, listen="127.0.0.1:0")
    print("measuring this machine ...")
    server = Server(settings)
    port = await server.start()
    try:
        await asyncio.to_thread(ask, f"127.0.0.1:{port}", checkpoint)
    finally:
        await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="safetensors file with timm's names of weights; default: random")
    parser.add_argument("--pixels", default="half", help="mean and deviation of its pictures: cifar10, imagenet, half")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = chosen.model or random_checkpoint(Path(folder))
        asyncio.run(serve(checkpoint, chosen.pixels, Path(folder) / "state"))


if __name__ == "__main__":
    main()
