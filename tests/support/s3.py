"""An S3 server in the process of the tests."""

import logging
import os
import uuid
from collections.abc import Iterator
from unittest import mock

import fsspec
import pytest


def serve_s3() -> Iterator[str]:
    """Run a server of the S3 protocol; yield the URL of an empty bucket. The environment names the server meanwhile."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # its requests are not what the command line prints
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with mock.patch.dict(os.environ, names):
        try:
            s3fs.S3FileSystem.clear_instance_cache()  # one that knows this server's port
            bucket = f"data-{uuid.uuid4().hex}"
            fsspec.filesystem("s3").mkdir(bucket)
            yield f"s3://{bucket}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
