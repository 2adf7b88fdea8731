"""A student as ONNX files for the device, each compared with torch before it is accepted (names: StudentManifest)."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import replaced
from isthmus.data.transforms import evaluation_frames
from isthmus.distill.models.heads import FusionHead, HeadBank, RatioHead
from isthmus.distill.models.trunk import EncoderPair
from isthmus.distill.release import Release
from isthmus.proto.messages import ratio_name

AUDIO_ENCODER, VISUAL_ENCODER = ENCODERS = ("audio_encoder.onnx", "visual_encoder.onnx")

OPSET = 18
TOLERANCE = 1e-3
"""Largest difference allowed between torch and ONNX Runtime, relative to the largest output."""


class ExportError(Exception):
    """An exported file whose outputs differ from torch's."""


class _AudioEncoder(nn.Module):
    def __init__(self, encoders: EncoderPair):
        super().__init__()
        self.encoders = encoders

    def forward(self, spectrogram_BFT: Tensor) -> Tensor:
        return self.encoders.audio(spectrogram_BFT)


class _VisualEncoder(nn.Module):
    def __init__(self, encoders: EncoderPair):
        super().__init__()
        self.encoders = encoders

    def forward(self, frames_BKCHW: Tensor) -> Tensor:
        return self.encoders.visual(frames_BKCHW).mean(dim=1)


class _Probabilities(nn.Module):
    def __init__(self, head: FusionHead | RatioHead):
        super().__init__()
        self.head = head

    def forward(self, audio_BD: Tensor, visual_BD: Tensor, present_B2: Tensor) -> Tensor:
        return torch.softmax(self.head(audio_BD, visual_BD, present_B2), dim=1)


class _Compressor(nn.Module):
    def __init__(self, head: RatioHead):
        super().__init__()
        self.head = head

    def forward(self, audio_BD: Tensor, visual_BD: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.compress(audio_BD, visual_BD)


def export_student(release: Release, student: EncoderPair, heads: HeadBank | None, out_dir: Path) -> list[Path]:
    """Write a student's files and return them, sorted. ``heads`` None makes an interim student without a local head.

    ``heads.safetensors`` stays in the cloud and is not among the returned files. Raises ExportError if a file's outputs
    differ from torch's.

    >>> files = export_student(release, release.student(), None, folder / "student")
    >>> [path.name for path in files]
    ['audio_encoder.onnx', 'teacher_head.onnx', 'visual_encoder.onnx']
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    spec, width = release.recipe.input, release.recipe.feature_width
    student = student.cpu().eval()
    teacher_head = release.teacher_head.cpu().eval()
    spectrogram = torch.randn(2, spec.spectrogram_bins, spec.spectrogram_columns)
    frames = torch.randn(2, spec.frames_used, 3, spec.frame_px, spec.frame_px)
    pair = (torch.rand(3, width), torch.rand(3, width))
    masked = (*pair, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    names = ("audio_BD", "visual_BD")
    head_names = (*names, "present_B2")
    files = [
        _export(
            _AudioEncoder(student),
            (spectrogram,),
            ("spectrogram_BFT",),
            ("features_BD",),
            out_dir / AUDIO_ENCODER,
        ),
        _export(_VisualEncoder(student), (frames,), ("frames_BKCHW",), ("features_BD",), out_dir / VISUAL_ENCODER),
        _export(_Probabilities(teacher_head), masked, head_names, ("probabilities_BC",), out_dir / "teacher_head.onnx"),
    ]
    if heads is not None:
        heads = heads.cpu().eval()
        local = _Probabilities(heads[heads.local_ratio])
        files.append(_export(local, masked, head_names, ("probabilities_BC",), out_dir / "local_head.onnx"))
        for ratio in heads.ratios:
            path = out_dir / f"compressor_r{ratio_name(ratio)}.onnx"
            files.append(_export(_Compressor(heads[ratio]), pair, names, ("audio_BW", "visual_BW"), path))
        heads.save(out_dir / "heads.safetensors")
    return sorted(files)


def encoder_inputs(name: str, clips: ClipArrays, batch: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the input of an encoder file for every clip, prepared as on the device, in batches."""
    count = len(clips.names)
    for start in range(0, count, batch):
        rows = range(start, min(start + batch, count))
        if name == AUDIO_ENCODER:
            yield np.stack([np.asarray(clips.spectrograms_NFT[row], np.float32) for row in rows])
        else:
            yield np.stack([evaluation_frames(clips.frames_NKHWC[row], clips.spec) for row in rows])


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], input_names: Sequence[str], output_names: Sequence[str], path: Path
) -> Path:
    module.eval()
    with replaced(path, durable=False) as part:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # An LSTM's first state is made for the batch that comes; _check tries batches of another size.
            warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size", UserWarning)
            warnings.filterwarnings("ignore", "Constant folding", UserWarning)
            # The TorchScript exporter: a tenth of the processor time of the dynamo one for these plain networks, and it
            # folds batch normalisation into the convolutions. Every personalisation waits for it.
            torch.onnx.export(
                module,
                inputs,
                str(part),
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=OPSET,
                dynamo=False,
                dynamic_axes={name: {0: "batch"} for name in (*input_names, *output_names)},
            )
        _check(module, inputs, part, path.name)
    return path


@torch.inference_mode()
def _check(module: nn.Module, inputs: tuple[Tensor, ...], onnx_path: Path, name: str) -> None:
    """Compare on the traced batch and on a batch of another size."""
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    for batch in (inputs, tuple(tensor[:1].repeat(3, *[1] * (tensor.ndim - 1)) for tensor in inputs)):
        expected = module(*batch)
        expected = expected if isinstance(expected, tuple) else (expected,)
        feed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), batch, strict=True)}
        for torch_value, onnx_value in zip(expected, session.run(None, feed), strict=True):
            scale = float(torch_value.abs().max()) + 1e-6
            difference = float(np.abs(torch_value.numpy() - onnx_value).max())
            if not difference <= TOLERANCE * scale:
                raise ExportError(f"{name}: ONNX Runtime differs from torch by {difference:.2e} (scale {scale:.2e})")
