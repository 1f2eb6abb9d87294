"""Reads a store by FORMAT.md alone: no softlabel in here, only what anybody has."""

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq


def read_parquet(path):
    file = pq.ParquetFile(path)
    identity = json.loads(file.metadata.metadata[b"softlabel"])
    table = file.read()
    row = {
        "key": table["key"].to_pylist(),
        "view": table["view"].to_numpy(),
        "label": table["label"].fill_null(-100).to_numpy(),
        "content": table["content"].fill_null(0).to_numpy(),
    }
    for column in identity["columns"]:
        raw = b"".join(table[column["name"]].to_pylist())
        row[column["name"]] = np.frombuffer(raw, column["dtype"]).reshape(-1, column["width"])
    return row


def read_hdf5(path):
    with h5py.File(path, "r") as file:
        identity = json.loads(file.attrs["softlabel"])
        data, offsets = file["key"][:].tobytes(), file["key_offsets"][:]
        row = {name: file[name][:] for name in ("view", "label", "content")}
        row["key"] = [data[offsets[i] : offsets[i + 1]].decode() for i in range(len(offsets) - 1)]
        for column in identity["columns"]:
            row[column["name"]] = file[column["name"]][:].view(column["dtype"])
    return row


def decode(run, row):
    """Scaled logits, float32 (N, C)."""
    assert run["encoding"]["name"] == "float16"
    return row["logits"].astype(np.float32)


def read_store(root):
    """Key, view, label, content and scaled logits of every row, in order."""
    manifest = json.loads((Path(root) / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"], manifest["complete"]) == ("softlabel-store", 1, True)
    segments = [json.loads((Path(root) / one["file"]).read_text()) for one in manifest["segments"]]
    records = sorted((record for one in segments for record in one["shards"]), key=lambda record: record["number"])
    read = read_parquet if manifest["run"]["format"] == "parquet" else read_hdf5
    shards = [read(Path(root) / record["file"]) for record in records]
    out = {name: np.concatenate([shard[name] for shard in shards]) for name in ("key", "view", "label", "content")}
    return out | {"scaled_logits": np.concatenate([decode(manifest["run"], shard) for shard in shards])}
