"""Measurements against floors and against other libraries: ``make bench``, or ``python -m tests.bench.<room>.<name>``.

All use one compute thread. It is set here because the libraries read it when they are first imported.
"""

import os
from typing import Final

THREADS: Final = 1

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = str(THREADS)
