"""Objects that are there when a server is ready are not looked at again; later garbage is collected all the same."""

import subprocess
import sys

PROGRAM = """
import gc, time, weakref
from isthmus.cloud.garbage import spare_what_is_there

class Thing: pass

library = [[number] for number in range(300_000)]
spare_what_is_there()
assert gc.get_freeze_count() > 300_000, gc.get_freeze_count()
assert len(gc.get_objects()) < 1_000, "so a full collection is short"
thing = Thing()
thing.itself, gone = thing, weakref.ref(thing)
del thing
gc.collect()
assert gone() is None
"""


def test_what_is_there_is_spared_and_what_comes_later_is_not() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
