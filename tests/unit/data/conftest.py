"""Pictures in Parquet files belong to the extra "elastic"; a device's environment has no reader for them."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("pyarrow") else ["test_images.py", "synthetic/test_details.py"]
