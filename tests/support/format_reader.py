# ruff: noqa: SIM115  (short is the point)
"""Reads a store by FORMAT.md alone: no softlabel in here, only what anybody has."""

import json

import h5py
import numpy as np
import pyarrow.parquet as pq

OTHERS = ("multi_hot", "length", "positions", "tokens", "mask")  # columns that are not the encoding's


def read_shard(path):
    if path.endswith(".parquet"):
        file = pq.ParquetFile(path)
        spec, table = json.loads(file.metadata.metadata[b"softlabel"]), file.read()
        row = {"key": table["key"].to_pylist(), "view": table["view"].to_numpy()}
        row |= {one: table[one].fill_null(none).to_numpy() for one, none in (("label", -100), ("content", 0))}
        raw = {one["name"]: np.frombuffer(b"".join(table[one["name"]].to_pylist()), "u1") for one in spec["columns"]}
    else:
        with h5py.File(path, "r") as file:
            spec, data, at = json.loads(file.attrs["softlabel"]), file["key"][:].tobytes(), file["key_offsets"][:]
            row = {one: file[one][:] for one in ("view", "label", "content")}
            row["key"] = [data[a:b].decode() for a, b in zip(at[:-1], at[1:], strict=True)]  # noqa: RUF007
            raw = {one["name"]: file[one["name"]][:] for one in spec["columns"]}
    return row, {one["name"]: raw[one["name"]].view(one["dtype"]).reshape(-1, one["width"]) for one in spec["columns"]}


def read_safetensors(path):
    raw = open(path, "rb").read()
    start = 8 + int.from_bytes(raw[:8], "little")
    spots = [(name, *one["data_offsets"], one["shape"]) for name, one in json.loads(raw[8:start]).items()]
    return {name: np.frombuffer(raw[start + a : start + b], "<f4").reshape(shape) for name, a, b, shape in spots}


def decode(run, columns, head):
    kept, classes, name = run["combine"]["rule"] == "keep", run["num_classes"], run["encoding"]["name"]
    members = len(run["members"]) if kept else 1
    labels = [one for one in columns if one not in OTHERS and not one.startswith("view_")]
    at = {one: columns[one].reshape(len(columns[one]) * members, -1) for one in labels}
    if name in ("float16", "float32"):
        logits = at["logits"].astype("f4")
    elif name == "int8":
        logits = at["q"] * at["scale"] + at["offset"]
        np.put_along_axis(logits, at["top_index"].astype("i8"), at["top_value"].astype("f4"), 1)
    elif name == "topk":
        tail = at["tail"][:, [run["encoding"]["temperatures"].index(run["temperature"])]]
        logits = np.repeat(tail - np.log(max(1, classes - at["index"].shape[1])), classes, 1).astype("f4")
        np.put_along_axis(logits, at["index"].astype("i8"), at["value"].astype("f4"), 1)
    elif name == "sampled":
        logits = np.full((len(at["index"]), classes), -np.inf, "f4")
        for r, s in zip(*np.nonzero(at["weight"]), strict=True):
            logits[r, at["index"][r, s]] = np.log(at["weight"][r, s])
    elif name == "head":
        hidden = at["hidden"].astype("f4") * at.get("hidden_scale", np.float32(1))
        logits = (hidden @ head["weight"].T + head["bias"]) / np.float32(run["temperature"])
    return logits.reshape(-1, members, classes) if kept else logits


def read_store(root):
    main = json.load(open(f"{root}/manifest.json"))
    assert (main["format"], main["complete"], main["format_version"] in range(1, 7)) == ("softlabel-store", True, True)
    records = [one for seg in main["segments"] for one in json.load(open(f"{root}/{seg['file']}"))["shards"]]
    heads = [one["file"] for one in main["extra"] if one["file"].endswith(".safetensors")]
    head = read_safetensors(f"{root}/{heads[0]}") if heads else None
    shards = [read_shard(f"{root}/{one['file']}") for one in sorted(records, key=lambda one: one["number"])]
    out = {name: np.concatenate([row[name] for row, _ in shards]) for name in ("key", "view", "label", "content")}
    for name in (one for one in shards[0][1] if one in OTHERS or one.startswith("view_")):
        out[name] = np.concatenate([columns[name] for _, columns in shards])
    return out | {"scaled_logits": np.concatenate([decode(main["run"], columns, head) for _, columns in shards])}
