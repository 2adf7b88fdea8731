"""Readers of recorded traces: both formats, and files that are not traces."""

import os
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.traces import TraceError, read_azure_functions_2021, read_azure_inference, read_trace

FUNCTIONS = "app,func,end_timestamp,duration\na,f,5.0,1.0\nb,g,3.5,3.0\n"
LLM = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:18:03.9799600,1,1\n"
)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_functions_arrive_when_they_began(tmp_path: Path) -> None:
    np.testing.assert_allclose(read_azure_functions_2021(written(tmp_path, FUNCTIONS)), [0.0, 3.5])


def test_llm_requests_keep_their_seven_decimals(tmp_path: Path) -> None:
    np.testing.assert_allclose(read_azure_inference(written(tmp_path, LLM)), [0.0, 0.052, 60.0], atol=1e-6)


@pytest.mark.parametrize(
    "times",
    [
        ("2024-05-10 00:00:00.250000+00:00", "2024-05-10 00:00:01+00:00"),
        ("2024-10-15T12:00:00.250Z", "2024-10-15T12:00:01.000Z"),
        ("2024-10-15T12:00:00,25 UTC", "2024-10-15T12:00:01"),
        ("2024-10-15T23:59:59.75-01:00", "2024-10-16T01:00:00.500Z"),
        ("2024-10-15T23:59:59.75+0530", "2024-10-15T18:30:00.5Z"),
    ],
)
def test_times_of_every_release_and_offset(tmp_path: Path, times: tuple[str, str]) -> None:
    text = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n" + "".join(f'"{time}",0,1,1\n' for time in times)
    np.testing.assert_allclose(read_trace(written(tmp_path, text)), [0.0, 0.75], atol=1e-6)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_what_editors_and_spreadsheets_save_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "saved.csv"
    for text in (
        LLM.replace("\n", "\r\n"),
        LLM.replace(",", ";"),
        LLM.replace(",", "\t") + "\t\t\n\n",
        "\n".join(",".join(f'"{field} "' for field in line.split(",")) for line in LLM.splitlines()),
        LLM.replace("TIMESTAMP", " Timestamp "),
    ):
        path.write_bytes(text.encode(encoding))
        assert len(read_trace(path)) == 3
    path.write_bytes(FUNCTIONS.replace(",", ";").replace(".", ",").encode(encoding))
    np.testing.assert_allclose(read_trace(path), [0.0, 3.5])


def test_a_pointer_in_place_of_a_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="git lfs pull"):
        read_trace(written(tmp_path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"))


def test_the_header_tells_the_format(tmp_path: Path) -> None:
    assert len(read_trace(written(tmp_path, FUNCTIONS))) == 2
    assert len(read_trace(written(tmp_path, LLM))) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "app,func,end_timestamp,duration\n",
        FUNCTIONS + "c,h,soon,1.0\n",
        FUNCTIONS + "c,h,1.0\n",
        FUNCTIONS + "c,h,nan,1.0\n",
        FUNCTIONS + "c,h,inf,1.0\n",
        FUNCTIONS + "c,h,1.0,-1.0\n",
        LLM + "yesterday,1,1\n",
        LLM + "2023-11-16 25:17:03.9799600,1,1\n",
        LLM + "2023-13-16 18:17:03.9799600,1,1\n",
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(TraceError):
        read_trace(written(tmp_path, text))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(FUNCTIONS.encode() + b"\xff\xfe\n")
    with pytest.raises(TraceError):
        read_trace(path)


def test_the_published_files() -> None:
    folder = os.environ.get("ISTHMUS_TRACES")
    if not folder:
        pytest.skip("set ISTHMUS_TRACES to a folder with the Azure traces to read real ones")
    llm_N = read_trace(Path(folder) / "azure_llm_2023_code.csv")
    assert len(llm_N) == 8_819 and 57 * 60 < llm_N[-1] < 58 * 60
    assert len(read_trace(Path(folder) / "azure_functions_2021_sample.csv")) > 190
