"""Readers of recorded traces: both formats, and what is no trace."""

import os
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.traces import TraceError, read_azure_functions_2021, read_azure_llm_2023, read_trace

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
    np.testing.assert_allclose(read_azure_llm_2023(written(tmp_path, LLM)), [0.0, 0.052, 60.0], atol=1e-6)


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
