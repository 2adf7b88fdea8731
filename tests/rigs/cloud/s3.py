"""An S3 service on loopback that speaks the real protocol over HTTP."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from tests.rigs.project.system import missing

BUCKET = "students"


@contextmanager
def running_s3() -> Iterator[str]:
    """Start a service with one bucket; yield the bucket's URL. Without the packages the test is skipped."""
    try:
        import boto3
        import s3fs
        from moto.server import ThreadedMotoServer
    except ModuleNotFoundError as error:
        missing(f"the Python package {error.name} is not installed: pip install -e '.[dev]'")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    # Connections are kept per process; those of an earlier service lead nowhere.
    s3fs.S3FileSystem.clear_instance_cache()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with patch.dict("os.environ", environment):
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield f"s3://{BUCKET}"
    finally:
        server.stop()
