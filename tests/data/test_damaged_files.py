"""Damaged and foreign files: each is refused at once by a sentence that names the file, whoever reads it."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mechkit as mk
from helpers.valid_calls import Material
from mechkit.plot import read_table

PACKAGE = str(Path(mk.__file__).parent)
SECONDS, BYTES = 2.0, 200 * 2**20

GRAPH = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "parallel": False, "mlps": True}
CIRCUIT = {
    "format": "mechkit circuit",
    "version": 1,
    "graph": GRAPH,
    "model": "",
    "weights_hash": "",
    "task": "",
    "provenance": {},
    "dtype": None,
    "edges": {"m0->logits": {"in_graph": True}},
}
RESULT = {
    "schema_version": 1,
    "coords": [["layer", [0, 1]]],
    "baselines": [],
    "base": "",
    "metric": "m",
    "unit": "u",
    "provenance": {},
    "cost": None,
}
LENS = {"format": 1, "layers": [0], "n_layers": 2, "provenance": {}}
TABLE = {
    "schema_version": 1,
    "columns": {"x": {"dtype": "float64", "values": [0.5, None]}, "y": {"dtype": "text", "values": ["a", "b"]}},
}
STUDY = '[[model]]\nname = "m"\n[[task]]\nname = "ioi"\n[[technique]]\nname = "ablation"\n'
NESTED = "[" * 200_000
FLOATS = {"values": ("F32", [2], 8)}


def raw(
    key: str, header: Any, tensors: dict[str, tuple[str, list[int], int]] = FLOATS, length: int | None = None
) -> bytes:
    """A safetensors file, byte by byte: `tensors` are dtype, shape and bytes. `header` is ours, as JSON unless it is text."""
    head: dict[str, Any] = {"__metadata__": {key: header if isinstance(header, str) else json.dumps(header)}}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(at)


def result(changes: Any = None, /, **more: Any) -> bytes:
    header = changes if isinstance(changes, str | list) else {**RESULT, **(changes or {})}
    return raw("mechkit_result", header, **more)


def lens(changes: dict[str, Any] | None = None, tensors: dict[str, tuple[str, list[int], int]] | None = None) -> bytes:
    tensors = tensors or {"A": ("F32", [1, 2, 2], 16), "b": ("F32", [1, 2], 8)}
    return raw("mechkit_tuned_lens", {**LENS, **(changes or {})}, tensors)


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def circuit(**changes: Any) -> bytes:
    return json.dumps({**CIRCUIT, **changes}).encode()


def mib(n_layers: int = 1, n_heads: int = 1, **changes: Any) -> bytes:
    cfg = {"n_layers": n_layers, "n_heads": n_heads, "parallel_attn_mlp": False, "d_model": 4}
    return json.dumps({"cfg": cfg, "nodes": {}, "edges": {}, **changes}).encode()


def scores(**extra: Any) -> bytes:
    """What `EdgeScores.save` writes of a graph of one layer and one head, with changes."""
    graph = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "parallel": False, "mlps": True}
    about = {"graph": graph, "baseline": {"clean": {"dtype": "float32", "values": [0.0]}}, **extra}
    writers, readers = ["input", "a0.h0", "m0"], ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "logits"]
    coords = [["writer", writers], ["reader", readers], ["prompt", [0]]]
    header = {"coords": coords, "provenance": {"edge_scores": about}}
    writing = {"input": range(5), "a0.h0": [3, 4], "m0": [4]}  # the readers after each writer
    values = [0.0 if reader in after else float("nan") for after in writing.values() for reader in range(5)]
    return result(header, tensors={"values": ("F32", [3, 5, 1], 60)})[:-60] + struct.pack("<15f", *values)


def toml(text: str) -> bytes:
    return text.encode()


COMMON: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"{",
    "zeros": bytes(4096),
    "binary": bytes(range(256)) * 16,
    "not UTF-8": b'{"format": "\xff\xfe"}',
    "nested": NESTED.encode(),
    "nested objects": b'{"a":' * 100_000,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
}
RESULTS: dict[str, bytes] = {
    "cut in its header": result()[:40],
    "cut in its numbers": result()[:-3],
    "length of 2^62": result(length=2**62),
    "length of 90 MB": result(length=90 * 2**20),
    "header nested without end": result(NESTED),
    "header is a list": result([]),
    "header is text": result("mechkit"),
    "header has a key twice and a number": result('{"schema_version": 1, "schema_version": NaN}'),
    **{f"no {key}": result(json.dumps(without(RESULT, key))) for key in RESULT},
    "another schema": result({"schema_version": 2}),
    "metric is a number": result({"metric": 5}),
    "unit is a list": result({"unit": []}),
    "provenance is a list": result({"provenance": [1]}),
    "cost is a number": result({"cost": 7}),
    "cost of other keys": result({"cost": {"tokens": 1}}),
    "cost below 0": result({"cost": {"block_tokens": -1, "naive_block_tokens": 1}}),
    "a dim twice": result({"coords": [["layer", [0, 1]], ["layer", [0, 1]]]}),
    "a label twice": result({"coords": [["layer", [0, 0]]]}),
    "labels of another length": result({"coords": [["layer", [0, 1, 2]]]}),
    "labels with a fraction": result({"coords": [["layer", [0, 0.5]]]}),
    "labels are true and false": result({"coords": [["layer", [True, False]]]}),
    "labels are a number": result({"coords": [["layer", 2]]}),
    "coords are a number": result({"coords": 3}),
    "a dim is a number": result({"coords": [[3, [0, 1]]]}),
    "a baseline that is not there": result({"baselines": ["clean"]}),
    "whole numbers": result(tensors={"values": ("I64", [2], 16)}),
    "shape and bytes disagree": result(tensors={"values": ("F32", [10**12], 8)}),
    "no values": result(tensors={"other": ("F32", [2], 8)}),
    "another program's": raw("format", "pt"),
    "no metadata": struct.pack("<Q", 2) + b"{}",
}
CIRCUITS: dict[str, bytes] = {
    "a list": b"[]",
    "of another kind": b'{"a": 1}',
    "cut": circuit()[:100],
    "a key twice": b'{"format": "mechkit circuit", "format": "x"}',
    "another version": circuit(version=2),
    **{f"no {key}": json.dumps(without(CIRCUIT, key)).encode() for key in CIRCUIT},
    "graph of 10^8 nodes": circuit(graph={**GRAPH, "n_layers": 10**5, "n_heads": 10**3, "n_kv_heads": 10**3}),
    "graph of 10^30 layers": circuit(graph={**GRAPH, "n_layers": 10**30}),
    "graph of 100 layers and 128 heads": circuit(graph={**GRAPH, "n_layers": 100, "n_heads": 128, "n_kv_heads": 128}),
    "scored graph of 60 layers and 64 heads": circuit(
        graph={**GRAPH, "n_layers": 60, "n_heads": 64, "n_kv_heads": 8}, dtype="float64"
    ),
    "graph without layers": circuit(graph={**GRAPH, "n_layers": 0}),
    "graph below 0": circuit(graph={**GRAPH, "n_heads": -4}),
    "graph of true layers": circuit(graph={**GRAPH, "n_layers": True}),
    "graph with a fraction": circuit(graph={**GRAPH, "n_layers": 1.5}),
    "parallel is text": circuit(graph={**GRAPH, "parallel": "no"}),
    "graph is a list": circuit(graph=[2, 4]),
    "provenance is a list": circuit(provenance=[1]),
    "model is a number": circuit(model=5),
    "edges are a list": circuit(edges=["m0->logits"]),
    "an edge that is none": circuit(edges={"m9->logits": {"in_graph": True}}),
    "an edge backwards": circuit(edges={"m1->m0": {"in_graph": True}}),
    "membership is a number": circuit(edges={"m0->logits": {"in_graph": 1}}),
    "a score of NaN": circuit(dtype="float32", edges={"m0->logits": {"in_graph": True, "score": float("nan")}}),
    "a score of 10^400": circuit(dtype="float32", edges={}).replace(
        b'"edges": {}', b'"edges": {"m0->logits": {"in_graph": true, "score": 1e400}}'
    ),
    "a score where there is none": circuit(edges={"m0->logits": {"in_graph": True, "score": 1.0}}),
    "a number of 5000 digits": circuit(version=0).replace(b'"version": 0', b'"version": ' + b"9" * 5000),
    "dtype of whole numbers": circuit(dtype="int64"),
    "MIB, nodes of another graph": mib(2, 2),
    "MIB, graph of 10^8 nodes": mib(10**5, 10**3),
    "MIB, nodes are a list": mib(nodes=[]),
    "MIB, cfg is a list": mib(cfg=[]),
    "MIB, heads are text": mib(n_heads="two"),  # type: ignore[arg-type]
}
LENSES: dict[str, bytes] = {
    "a result": result(),
    "another format": lens({"format": 2}),
    "no layers": raw(
        "mechkit_tuned_lens", without(LENS, "layers"), {"A": ("F32", [1, 2, 2], 16), "b": ("F32", [1, 2], 8)}
    ),
    "layers are text": lens({"layers": "ab"}),
    "a layer twice": lens({"layers": [0, 0]}),
    "a layer beyond": lens({"layers": [7]}),
    "n_layers is text": lens({"n_layers": "2"}),
    "no A": lens(tensors={"b": ("F32", [1, 2], 8)}),
    "A not square": lens(tensors={"A": ("F32", [1, 2, 3], 24), "b": ("F32", [1, 2], 8)}),
    "a scalar b": lens(tensors={"A": ("F32", [1, 2, 2], 16), "b": ("F32", [], 4)}),
    "whole numbers": lens(tensors={"A": ("I32", [1, 2, 2], 16), "b": ("I32", [1, 2], 8)}),
    "provenance is a number": lens({"provenance": 3}),
}
SCORES: dict[str, bytes] = {
    "a result": result(),
    "graph of another size": scores(graph={**GRAPH}),
    "graph of 10^8 nodes": scores(graph={**GRAPH, "n_layers": 10**5, "n_heads": 10**3, "n_kv_heads": 10**3}),
    "graph of other keys": scores(graph={"layers": 1}),
    "graph is a number": scores(graph=1),
    "baseline is a list": scores(baseline=[1]),
    "baseline of a dtype that is a function": scores(baseline={"clean": {"dtype": "load", "values": [0.0]}}),
    "baseline of text": scores(baseline={"clean": {"dtype": "float32", "values": "a"}}),
}
TABLES: dict[str, bytes] = {
    "a list": b"[]",
    "another version": json.dumps({**TABLE, "schema_version": 9}).encode(),
    "no columns": json.dumps(without(TABLE, "columns")).encode(),
    "columns are a list": json.dumps({**TABLE, "columns": []}).encode(),
    "a column of text as numbers": json.dumps(
        {**TABLE, "columns": {"x": {"dtype": "float64", "values": ["a"]}}}
    ).encode(),
    "a column of objects": json.dumps({**TABLE, "columns": {"x": {"dtype": "object", "values": [1]}}}).encode(),
    "a column that is a number": json.dumps({**TABLE, "columns": {"x": {"dtype": "int64", "values": 3}}}).encode(),
    "a number beyond 64 bits": json.dumps({**TABLE, "columns": {"x": {"dtype": "int64", "values": [2**70]}}}).encode(),
    "columns of two lengths": json.dumps(
        {**TABLE, "columns": {"x": {"dtype": "int64", "values": [1]}, "y": {"dtype": "int64", "values": [1, 2]}}}
    ).encode(),
}
STUDIES: dict[str, bytes] = {
    "nested": toml("models = " + "[" * 5000 + "]" * 5000),
    "10^12 jobs": toml(STUDY + "".join(f"grid.{key} = [{', '.join(map(str, range(10_000)))}]\n" for key in "abc")),
    "10^6 jobs": toml(
        STUDY.replace('"ioi"\n', f'"ioi"\ngrid.seed = {list(range(1000))}\n') + f"grid.budget = {list(range(1000))}\n"
    ),
    "a budget of 400 digits": toml("budget = '" + "9" * 400 + " GB'\n" + STUDY),
    "an empty store": toml("store = ''\n" + STUDY),
    "a shard of 0": toml("shard = 0\n" + STUDY),
    "a key of its own": toml("stores = 'a'\n" + STUDY),
    "models are a number": toml("model = 3\n"),
    "a grid that is a number": toml(STUDY + "grid.mode = 3\n"),
    "a number of jobs below 1": toml(STUDY.replace('"ioi"', '"ioi"\nn = -1')),
}
READERS: dict[str, tuple[Callable[[Path], Any], str, dict[str, bytes], bytes]] = {
    "Result.load": (mk.Result.load, "a.safetensors", RESULTS, result()),
    "EdgeScores.load": (mk.EdgeScores.load, "a.safetensors", SCORES, scores()),
    "TunedLens.load": (mk.TunedLens.load, "a.safetensors", LENSES, lens()),
    "Circuit.from_json": (mk.Circuit.from_json, "a.json", CIRCUITS, circuit()),
    "read_table": (read_table, "a.json", TABLES, json.dumps(TABLE).encode()),
    "Study.from_toml": (mk.Study.from_toml, "a.toml", STUDIES, STUDY.encode()),
}
FILES = [(reader, name) for reader, (_, _, own, _) in READERS.items() for name in {**COMMON, **own}]


@pytest.fixture(autouse=True)
def _library_alone() -> Iterator[None]:
    """Without shape checks, so that the library's own sentence is what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def memory(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)


def check_refused(read: Callable[[Path], Any], path: Path) -> None:
    """The file is refused by a sentence of ours that names it, in 2 s and 200 MB."""
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")  # Linux forgets the highest use of memory so far
    before, began = memory("VmRSS"), time.process_time()
    with pytest.raises(ValueError, match=r"expected|nothing was run") as seen:
        read(path)
    assert time.process_time() - began < SECONDS
    assert memory("VmHWM") - before < BYTES
    assert path.name in str(seen.value)
    assert traceback.extract_tb(seen.tb)[-1].filename.startswith(PACKAGE)


@pytest.mark.parametrize(("reader", "name"), FILES, ids=[f"{reader}, {name}" for reader, name in FILES])
def test_damaged_files_are_refused_at_once(reader: str, name: str, tmp_path: Path) -> None:
    read, file, own, _ = READERS[reader]
    path = tmp_path / file
    path.write_bytes({**COMMON, **own}[name])
    check_refused(read, path)


@pytest.mark.parametrize("reader", READERS)
def test_good_files_are_read(reader: str, tmp_path: Path) -> None:
    """The control: what is damaged above is valid without the damage."""
    read, file, _, good = READERS[reader]
    (tmp_path / file).write_bytes(good)
    read(tmp_path / file)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused(reader: str, tmp_path: Path) -> None:
    read = READERS[reader][0]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, Path("/dev/zero"), tmp_path / ("x" * 5000)):
        check_refused(read, path)
    with pytest.raises(FileNotFoundError, match="there is no such file") as seen:
        read(tmp_path / "nowhere")
    assert isinstance(seen.value, ValueError)


def test_there_are_as_many_damaged_files_as_promised() -> None:
    assert len(FILES) >= 60


def test_nan_in_a_lens_is_refused(tmp_path: Path) -> None:
    header = {"mechkit_tuned_lens": json.dumps(LENS)}
    save_file({"A": torch.full((1, 2, 2), torch.nan), "b": torch.zeros(1, 2)}, tmp_path / "a", metadata=header)
    with pytest.raises(ValueError, match="A, b: expected finite numbers"):
        mk.TunedLens.load(tmp_path / "a")


def test_a_nan_where_a_cell_is_missing_stays_one(tmp_path: Path) -> None:
    made = mk.Result(torch.tensor([1.0, torch.nan]), ("layer",), {"layer": (0, 1)}, {}, "", "m", "u", {})
    assert torch.equal(mk.Result.load(made.save(tmp_path / "r")).values.isnan(), torch.tensor([False, True]))


@pytest.mark.parametrize("content", [b"", NESTED.encode(), b"[]", b'{"a": 1}', b"\xff", b'{"jobs": 3, "digest": ""}'])
def test_damaged_stores_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    check_refused(mk.Study.open, tmp_path)


def test_a_store_whose_manifest_is_a_pipe_or_a_folder_is_refused(tmp_path: Path) -> None:
    for kind in (os.mkfifo, os.mkdir):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        kind(folder / "manifest.json")
        check_refused(mk.Study.open, folder)


def test_grids_are_counted_before_they_are_expanded(tmp_path: Path) -> None:
    tasks = [{"name": "ioi", "grid": {"seed": list(range(1000)), "n": list(range(1, 1001))}}]
    began = time.process_time()
    with pytest.raises(ValueError, match=r"at most 100,000 jobs, got .*1,000,000 tasks .* = 1,000,000"):
        mk.Study(["m"], tasks, ["ablation"], store=tmp_path)
    assert time.process_time() - began < SECONDS
    assert len(mk.Study(["m"], [{"name": "ioi", "grid": {"seed": [0, 1, 2]}}], ["ablation"], store=tmp_path)) == 3


def writers(folder: Path) -> dict[str, Callable[[Any], Path]]:
    """Everything that writes one file."""
    material = Material(folder)
    figure = mk.plot.heatmap(material.heads.mean())
    return {
        "Result.save": material.heads.save,
        "EdgeScores.save": material.scores.save,
        "TunedLens.save": material.lens.save,
        "Circuit.to_json": material.circuit.to_json,
        "Figure.save": figure.save,
        "write_html": partial(mk.plot.write_html, figure),
        "report": lambda path: mk.report(path, figure, code=False),
    }


@pytest.mark.filterwarnings("ignore")
def test_where_nothing_can_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("a file")
    for name, write in writers(tmp_path).items():
        made = name in ("Figure.save", "write_html", "report")  # these make folders that are missing
        wrong = ["folder.html", "file/a.html"] + ([] if made else ["nowhere/a.html"])
        for path in wrong:
            with pytest.raises(ValueError, match="path: ") as seen:
                write(tmp_path / path)
            assert Path(path).name in str(seen.value), name
            assert "partial" not in str(seen.value), name
        for wrong_type in (3, None, b"x"):
            with pytest.raises(TypeError, match="path: expected a"):
                write(wrong_type)
        assert write("~/a.html") == tmp_path / "a.html"
        assert (tmp_path / "a.html").stat().st_size > 0
        (tmp_path / "a.html").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html"]
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_home_folder_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = mk.Result(torch.zeros(1), ("layer",), {"layer": (0,)}, {}, "", "m", "u", {}).save("~/a.safetensors")
    assert found == tmp_path / "a.safetensors"
    assert mk.Result.load("~/a.safetensors").coords == {"layer": (0,)}


def test_a_store_with_a_nul_is_refused_with_the_files_name(tmp_path: Path) -> None:
    text = 'store = "a\\u0000b"\n[[model]]\nname = "tiny"\n[[task]]\nname = "induction"\n[[technique]]\nname = "ablation"\n'
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(ValueError, match=r"study\.toml.*\n.*store") as seen:
        mk.Study.from_toml(tmp_path / "study.toml")
    assert "expected a folder or an object store's URL" in str(seen.value)


@pytest.mark.parametrize("store", ["", " "])
def test_a_study_needs_a_store(store: str) -> None:
    with pytest.raises(ValueError, match="store: "):
        mk.Study(["m"], ["ioi"], ["ablation"], store=store)


def test_no_spreadsheet_runs_a_text_cell(tmp_path: Path) -> None:
    texts = ["=1+1", "+a", "-b", "@SUM(A1)", "\tc", "\rd", "plain", "'=quoted", "'plain", "''=x", "a=b", '"q", w\nx']
    labels = {"token": tuple(texts), "prompt": (0,)}
    made = mk.Result(torch.arange(12.0)[:, None] - 6, ("token", "prompt"), labels, {}, "", "m", "u", {})
    figure = mk.plot.bars(made.mean("prompt"), k=12)
    path = figure.save(tmp_path / "figure.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    text_cells = [cell for row in rows for name, cell in row.items() if name not in ("value", "effect")]
    assert not [cell for cell in text_cells if cell[:1] in tuple("=+-@\t\r")]
    numbers = [float(row["value"]) for row in rows]
    assert min(numbers) == -6.0  # a number's minus stays
    back, exact = read_table(path), figure.table()
    for name, column in exact.items():
        assert str(back[name].tolist()) == str(np.asarray(column).tolist()), name  # as text, since NaN is not NaN


@pytest.mark.parametrize(
    "label",
    [
        "\n=1",
        "＝1",
        "＋1",
        "－1",
        "＠x",
        "1e5",
        "5",
        " 7",
        "1_000",
        ".5",
        "nan",
        "Infinity",
        "True",
        "'5",
        "''=1",
        "'a",
        "5 a",
        "-5",
    ],
)
def test_labels_of_figures_come_back_as_they_were(label: str, tmp_path: Path) -> None:
    result = mk.Result(torch.zeros(1), ("token",), {"token": (label,)}, {}, "", "m", "u", {})
    path = mk.plot.bars(result).save(tmp_path / "bars.csv")
    columns = [column.tolist() for column in read_table(path).values()]
    assert [label] in columns, columns
    cells = [cell for row in csv.reader(io.StringIO(path.read_bytes().decode(), newline="")) for cell in row]
    assert not [cell for cell in cells if cell[:1] in tuple("=+@\t\r\n＝＋－＠")]
