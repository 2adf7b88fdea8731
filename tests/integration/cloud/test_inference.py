"""The stream of feature frames: bad frames are refused one by one; the stream and other streams continue."""

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from isthmus.distill.models.heads import HeadBank
from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType
from isthmus.proto.v1 import isthmus_pb2 as pb

D = 128


def a_frame(seed: int = 0, ratio: float = 1.0, width: int | None = None) -> bytes:
    rng = np.random.default_rng(seed)
    shape = int(D / ratio) if width is None else width
    features = Features(rng.random(shape, np.float32), rng.random(shape, np.float32))
    return pack_frame(FeatureFrame(features, ratio, NumberType.FP32))


def sealed(frame: bytes) -> bytes:
    """Return the frame with a correct checksum."""
    return frame[:-4] + struct.pack("<I", zlib.crc32(frame[:-4]))


def bad_frames() -> dict[str, bytes]:
    good = bytearray(a_frame())
    nan = good.copy()
    nan[12:16] = struct.pack("<f", float("nan"))
    version = good.copy()
    version[4] = 9
    flipped = good.copy()
    flipped[100] ^= 1
    return {
        "empty": b"",
        "noise": b"\xff" * 64,
        "NaN": sealed(bytes(nan)),
        "version": sealed(bytes(version)),
        "one flipped bit": bytes(flipped),
        "cut short": bytes(good[:-9]),
        "unknown ratio": a_frame(ratio=3.0),
        "wrong width": a_frame(width=D - 1),
    }


async def infer(device: Any, student_id: str, requests: list[pb.InferRequest], **options: Any) -> list[Any]:
    metadata = (*device.metadata, ("isthmus-student", student_id))
    return [reply async for reply in device.inference.Infer(iter(requests), metadata=metadata, **options)]


def test_a_bad_frame_is_answered_with_its_error_and_the_stream_goes_on(rig: Any) -> None:
    bad = bad_frames()
    frames = [a_frame(1), *bad.values(), a_frame(2, ratio=2.0)]

    async def scenario() -> list[pb.InferResponse]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            student_id = (await device.describe()).student_id
            requests = [pb.InferRequest(sequence=i, frame=frame) for i, frame in enumerate(frames)]
            return await infer(device, student_id, requests)

    first, *refused, last = asyncio.run(scenario())
    for answered in (first, last):
        assert not answered.HasField("error")
        assert sum(answered.probabilities) == pytest.approx(1.0, abs=1e-5)
    assert last.sequence == len(bad) + 1
    errors = {name: reply.error for name, reply in zip(bad, refused, strict=True)}
    assert {name: error.code for name, error in errors.items()} == dict.fromkeys(bad, 3), "INVALID_ARGUMENT"
    assert len({error.message for error in errors.values()}) >= 6, "each names its fault"
    assert not any(reply.probabilities for reply in refused)


def test_a_clip_with_one_modality_is_answered_by_a_head_that_knows_it(rig: Any) -> None:
    rng = np.random.default_rng(4)
    audio_D, visual_D = rng.random((2, D), np.float32)
    given = [Features(audio_D, visual_D), Features(audio_D, None), Features(None, visual_D)]
    frames = [pack_frame(FeatureFrame(features, 1.0, NumberType.FP32)) for features in given]
    neither = bytearray(frames[1])
    neither[10] = 0
    frames.append(sealed(bytes(neither)))
    assert len(frames[1]) == len(frames[2]) < 0.51 * len(frames[0])

    async def scenario() -> list[pb.InferResponse]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            student_id = (await device.describe()).student_id
            requests = [pb.InferRequest(sequence=i, frame=frame) for i, frame in enumerate(frames)]
            return await infer(device, student_id, requests)

    *answered, refused = asyncio.run(scenario())
    bank = HeadBank.load(rig.release / "base" / "heads.safetensors")
    for features, reply in zip(given, answered, strict=True):
        expected_C = torch.softmax(
            bank[1.0].classify(
                *(torch.from_numpy(vector)[None] for vector in features.filled()),
                torch.from_numpy(features.present_2())[None],
            ),
            dim=1,
        )[0]
        np.testing.assert_allclose(reply.probabilities, expected_C.detach().numpy(), rtol=1e-4)
    assert len({tuple(reply.probabilities) for reply in answered}) == 3
    assert "neither sound nor picture" in refused.error.message


def test_one_devices_rubbish_does_not_touch_anothers_stream(rig: Any) -> None:
    async def scenario() -> tuple[list[pb.InferResponse], list[pb.InferResponse]]:
        async with rig.running() as (_, channel):
            good, bad = await rig.enrol(channel, "good"), await rig.enrol(channel, "bad")
            student_id = (await good.describe()).student_id
            rubbish = [pb.InferRequest(sequence=i, frame=bytes(50)) for i in range(100)]
            sound = [pb.InferRequest(sequence=i, frame=a_frame(i)) for i in range(100)]
            both = await asyncio.gather(infer(good, student_id, sound), infer(bad, student_id, rubbish))
            return both[0], both[1]

    sound, refused = asyncio.run(scenario())
    assert len(sound) == len(refused) == 100
    assert not any(reply.HasField("error") for reply in sound)
    assert all(reply.HasField("error") for reply in refused)


def test_the_sequence_must_rise(rig: Any) -> None:
    async def scenario() -> list[pb.InferResponse]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            student_id = (await device.describe()).student_id
            order = (4, 4, 3, 9, -1, 10)
            return await infer(device, student_id, [pb.InferRequest(sequence=i, frame=a_frame()) for i in order])

    assert [reply.HasField("error") for reply in asyncio.run(scenario())] == [False, True, True, False, True, False]


def test_a_stream_must_name_a_student_that_this_device_may_use(rig: Any) -> None:
    async def scenario() -> list[grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            codes = []
            for student_id in ("no-such-student", "../x", ""):
                codes.append((await rig.refusal(infer(device, student_id, [])))[0])
            codes.append((await rig.refusal(device.inference.Infer(iter(()), metadata=device.metadata)))[0])
            return codes

    not_found, *malformed = asyncio.run(scenario())
    assert not_found is grpc.StatusCode.NOT_FOUND
    assert malformed == [grpc.StatusCode.INVALID_ARGUMENT] * 3


def test_a_stream_ends_at_its_deadline_and_a_cancelled_one_frees_the_device(rig: Any) -> None:
    async def endless() -> AsyncIterator[pb.InferRequest]:
        yield pb.InferRequest(sequence=0, frame=a_frame())
        await asyncio.Event().wait()

    async def scenario() -> grpc.StatusCode:
        async with rig.running(max_calls_per_device=1) as (_, channel):
            device = await rig.enrol(channel)
            student_id = (await device.describe()).student_id
            metadata = (*device.metadata, ("isthmus-student", student_id))
            code = await device.inference.Infer(endless(), metadata=metadata, timeout=1.0).code()
            for _ in range(3):  # each stream is let go when its client hangs up
                async with asyncio.timeout(60):
                    while await _is_busy(device):
                        await asyncio.sleep(0.01)
                call = device.inference.Infer(endless(), metadata=metadata)
                assert not (await call.read()).HasField("error")
                busy, _ = await rig.refusal(device.describe())
                assert busy is grpc.StatusCode.RESOURCE_EXHAUSTED
                call.cancel()
            return code

    assert asyncio.run(scenario()) is grpc.StatusCode.DEADLINE_EXCEEDED


async def _is_busy(device: Any) -> bool:
    try:
        await device.describe()
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return True
    return False
