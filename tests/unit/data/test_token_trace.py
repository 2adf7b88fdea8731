"""Traces of requests with their numbers of tokens."""

from pathlib import Path

import numpy as np
import pytest

from isthmus.data.traces import TraceError, read_azure_tokens


def test_rows_are_ascending_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:05.0000000,300,8\n\n2023-11-16 18:17:03.5000000,4808,10\n"
    )
    np.testing.assert_array_equal(read_azure_tokens(path), [[0.0, 4808, 10], [1.5, 300, 8]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:17:05,3\n", "no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:05,3,x\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:05,3,0\n", "at least one token"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "at least one token"),
    ],
)
def test_other_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(TraceError, match=said):
        read_azure_tokens(tmp_path / "trace.csv")
