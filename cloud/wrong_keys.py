"""Wrong enrolment keys: logged, and answered more slowly the more of them come from one address. Knows no grpc."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from isthmus.proto.errors import Busy

log = logging.getLogger(__name__)

_FREE: Final = 3
"""Wrong keys that are answered at once: a person mistypes."""
_FIRST_S: Final = 0.25
_LONGEST_S: Final = 5.0
_FORGET_S: Final = 300.0
_MOST_WAITING: Final = 16
"""Wrong keys of one address that wait for their answer. Further ones are not compared at all."""
_MOST_ADDRESSES: Final = 1_000


@dataclass
class _Address:
    wrong: int = 0
    waiting: int = 0
    last_s: float = 0.0


class WrongKeys:
    """Counts wrong keys by address. Everyone behind one address shares its count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._addresses: OrderedDict[str, _Address] = OrderedDict()

    def admit(self, address: str) -> None:
        """Check that a key from ``address`` may be compared. Raises Busy while many wrong ones wait for an answer."""
        known = self._addresses.get(address)
        if known is not None and known.waiting >= _MOST_WAITING:
            raise Busy("too many wrong keys came from your address; try again later", retry_after_s=_LONGEST_S)

    def begin(self, address: str) -> float:
        """Record a wrong key; return the seconds to wait before it is answered. Call ``end`` afterwards."""
        now_s = self._clock()
        known = self._addresses.setdefault(address, _Address())
        self._addresses.move_to_end(address)
        if now_s - known.last_s > _FORGET_S:
            known.wrong = 0
        known.wrong, known.last_s, known.waiting = known.wrong + 1, now_s, known.waiting + 1
        if len(self._addresses) > _MOST_ADDRESSES:
            self._addresses.popitem(last=False)
        # The 1st, 2nd, 4th, 8th ... are logged: a log must not grow with an attack.
        if known.wrong & (known.wrong - 1) == 0:
            log.warning("wrong enrolment key from %s, %d so far", address, known.wrong)
        return 0.0 if known.wrong <= _FREE else min(_LONGEST_S, _FIRST_S * 2.0 ** min(known.wrong - _FREE - 1, 10))

    def end(self, address: str) -> None:
        """Record that a wrong key of ``address`` was answered."""
        known = self._addresses.get(address)
        if known is not None:
            known.waiting = max(0, known.waiting - 1)
