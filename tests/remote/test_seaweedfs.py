"""The S3 server of the tests checks signatures, and a dataset arrives through the proxy as it was packed."""

import fsspec
import pytest

from tests.trees import contents

pytestmark = pytest.mark.slow


def test_an_uploaded_dataset_is_read_through_the_proxy(packed, packed_url, proxied):
    fs, path = fsspec.url_to_fs(packed_url)
    files = contents(packed)
    assert {name: fs.cat_file(f"{path}/{name}") for name in files} == files
    traffic = {name.partition("/shards/")[2]: each.bytes for name, each in proxied.traffic.items()}
    assert traffic == {name: len(content) for name, content in files.items()}


def test_wrong_credentials_are_refused(packed_url, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError):
        S3FileSystem().cat_file(f"{packed_url}/dataset.json")
