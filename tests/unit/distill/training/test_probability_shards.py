"""A folder of shards: what is written is read, and what is missing, damaged or no set of samples is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from isthmus.distill.training.probability_shards import MANIFEST, CutArray, ShardsError, open_shards, write_shards


def shards() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.dirichlet(np.ones(4), samples).astype(np.float16) for samples in (5, 1, 8)]


def test_what_is_written_is_read_from_memory_mapped_files(tmp_path: Path) -> None:
    written = write_shards(tmp_path, shards())
    opened = open_shards(tmp_path)
    assert (opened.sizes, opened.classes, opened.digest) == ((5, 1, 8), 4, written.digest)
    for number, shard in enumerate(shards()):
        found = opened.shard(number).read()
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, shard)


def test_a_set_is_not_written_over_another(tmp_path: Path) -> None:
    write_shards(tmp_path, shards())
    with pytest.raises(FileExistsError, match="holds shards already"):
        write_shards(tmp_path, shards())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "no shard to write"),
        ([np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)], "one width"),
        ([np.ones((0, 3), np.float32)], "at least one sample"),
        ([np.ones(3, np.float32)], "one width"),
        ([np.ones((2, 3), np.float64)], "float64; it must be one of float16, float32"),
    ],
)
def test_what_is_no_set_of_samples_is_not_written(tmp_path: Path, wrong: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, wrong)
    assert not (tmp_path / MANIFEST).exists()


def test_a_folder_that_holds_none_and_damaged_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardsError, match="holds no shards"):
        open_shards(tmp_path)
    good = {"classes": 3, "shards": [{"samples": 2, "sha256": "0" * 64}]}
    for wrong in (
        "[]",
        "{}",
        "x",
        json.dumps(good | {"shards": []}),
        json.dumps(good | {"classes": 0}),
        '{"shards": 3}',
    ):
        (tmp_path / MANIFEST).write_text(wrong)
        with pytest.raises(ShardsError, match=r"shards\.json"):
            open_shards(tmp_path)


def test_a_shard_of_another_width_than_the_list_says_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, shards())
    listed = json.loads((tmp_path / MANIFEST).read_text()) | {"classes": 5}
    (tmp_path / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(ShardsError, match="of another set"):
        open_shards(tmp_path).shard(0).read()


def test_missing_damaged_and_pickled_files_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [*shards(), *shards()])
    (tmp_path / "00000.npy").unlink()
    (tmp_path / "00001.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "00002.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "00003.npy").write_bytes(b"")  # a copy that was cut off
    (tmp_path / "00004.npy").write_bytes(b"PK\x03\x04 is how an archive begins")
    np.save(tmp_path / "00005.npy", np.full((8, 5), 0.2, np.float16))
    opened = open_shards(tmp_path)
    for number in range(6):
        with pytest.raises(ShardsError, match="copy it to this machine again"):
            opened.shard(number).read()


def test_an_array_is_cut_into_shards_that_are_read_as_one(tmp_path: Path) -> None:
    whole_NC = np.random.default_rng(1).dirichlet(np.ones(4), 23).astype(np.float32)
    np.save(tmp_path / "all.npy", whole_NC)
    cut = CutArray.open(tmp_path / "all.npy", 10)
    assert (tuple(cut.sizes), cut.samples, cut.classes) == ((10, 10, 3), 23, 4)
    located = [cut.shard(number) for number in range(3)]
    np.testing.assert_array_equal(np.concatenate([each.read() for each in located]), whole_NC)
    changed_NC = whole_NC.copy()
    changed_NC[12] = changed_NC[11]
    np.save(tmp_path / "all.npy", changed_NC)
    np.testing.assert_array_equal(located[0].read(), whole_NC[:10])
    with pytest.raises(ShardsError, match=r"all\.npy is damaged, or of another set"):
        located[1].read()


def test_what_is_no_array_of_samples_is_not_cut(tmp_path: Path) -> None:
    with pytest.raises(ShardsError, match="cannot be read"):
        CutArray.open(tmp_path / "none.npy", 10)
    for wrong in (np.ones(4, np.float32), np.ones((4, 2)), np.asfortranarray(np.ones((4, 2), np.float32))):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(ShardsError, match="no rows of probabilities"):
            CutArray.open(tmp_path / "wrong.npy", 10)
    np.save(tmp_path / "empty.npy", np.ones((0, 2), np.float32))
    with pytest.raises(ShardsError):
        CutArray.open(tmp_path / "empty.npy", 10)
    np.save(tmp_path / "good.npy", np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match="at least 1"):
        CutArray.open(tmp_path / "good.npy", 0)
