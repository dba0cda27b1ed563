# SPDX-License-Identifier: Apache-2.0
"""Atomic files and folders under real kills, stamps, and that nothing in the package writes in another way."""

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effsam3.errors import UserError
from effsam3.files import atomic_file, atomic_folder, stamp, write_bytes, write_json, write_text

PACKAGE = Path(__file__).parents[2] / "effsam3"
WITHOUT_END = """
import itertools, sys
from pathlib import Path
from effsam3.files import atomic_folder, write_json
path = Path(sys.argv[1])
print("begun", flush=True)
for number in itertools.count():
    write_json(path / "file.json", [number] * 20_000)
    with atomic_folder(path / "folder") as folder:
        for name in "abc":
            (folder / name).write_text(str(number))
"""
HALF = """
import sys, time
from pathlib import Path
from effsam3.files import atomic_file, atomic_folder
path = Path(sys.argv[1])
with atomic_file(path / "file") as file, atomic_folder(path / "folder") as folder:
    for part in (file, folder / "inside"):
        part.write_text("new, but only hal")
    print("begun", flush=True)
    time.sleep(60)
"""


def killed(code, path, after):
    """Run code on a folder and kill it some time after it has printed a line."""
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begun\n"
    time.sleep(after)
    child.kill()
    assert child.wait() == -signal.SIGKILL


def visible(path):
    return sorted(one.name for one in path.iterdir() if not one.name.startswith("."))


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "old")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("old")
    killed(HALF, tmp_path, 0)
    assert visible(tmp_path) == ["file", "folder"] and len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "old"
    write_text(tmp_path / "file", "new")
    with atomic_folder(tmp_path / "folder") as folder:
        assert not list(folder.iterdir())
    assert (tmp_path / "file").read_text() == "new" and not visible(tmp_path / "folder")


def test_kills_at_any_time_leave_whole_files(tmp_path):
    for trial in range(4):
        killed(WITHOUT_END, tmp_path, random.Random(trial).uniform(0.01, 0.1))
        numbers = json.loads((tmp_path / "file.json").read_text())
        assert len(numbers) == 20_000 and len(set(numbers)) == 1
        assert set(visible(tmp_path)) <= {"file.json", "folder"}
        folder = tmp_path / "folder"  # no call replaces a folder: for an instant it is not there
        if folder.is_dir():
            assert visible(folder) == ["a", "b", "c"] and len({one.read_text() for one in folder.iterdir()}) == 1


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    write_bytes(tmp_path / "file", b"old")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_file(tmp_path / "file") as file:
        file.write_text("new")
        raise OSError("full")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {1, 2})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "old"


def test_all_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
    hidden = str(tmp_path / ".out.partial")
    assert done[-2:] == [hidden, str(tmp_path)] and set(done[:-2]) == {f"{hidden}/inner", f"{hidden}/inner/file"}
    done.clear()
    write_text(tmp_path / "file", "x")
    assert done == [str(tmp_path / f".file.{os.getpid()}.partial"), str(tmp_path)]


def test_others_may_read_what_safetensors_writes(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        (folder / "file").chmod(0o600)
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o644


# ---- stamps


def test_a_stamp_lets_the_same_settings_pass_only(tmp_path):
    file = tmp_path / "data" / "synthetic.json"
    for _ in range(2):
        stamp(file, {"images": 4, "seed": 0}, "synthetic images", "data.index", real=tmp_path / "data" / "index")
        (tmp_path / "data" / "index").write_text("made")
    assert json.loads(file.read_text()) == {"images": 4, "seed": 0}
    with pytest.raises(UserError) as error:
        stamp(file, {"images": 5, "seed": 0}, "synthetic images", "data.index")
    for part in ("data.index: ", "'images': 4", "'images': 5", "synthetic images", "delete this one"):
        assert part in str(error.value)
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged.*delete it and what is next to it"):
        stamp(file, {"images": 4, "seed": 0}, "synthetic images", "data.index")


def test_what_has_no_stamp_is_not_touched(tmp_path):
    (tmp_path / "index").write_text("real")
    with pytest.raises(UserError, match="index is there and was not made from synthetic images; name another path"):
        stamp(tmp_path / "stamp", {}, "synthetic images", "data.index", real=tmp_path / "index")
    assert visible(tmp_path) == ["index"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.index: .* cannot be written"):
        stamp(tmp_path / "file" / "stamp", {}, "synthetic images", "data.index")


# ---- nobody else writes

# Calls that write to a path or give it another name, by the last part of their names and by the whole.
WRITERS = (
    "write_text write_bytes save savefig save_file save_pretrained write_table new_stream to_parquet rename copyfile "
    "copytree move"
).split()
GROWS = "grows in place; what a kill has torn is left out where it is read"
INSIDE = "gets a path inside an atomic_file or atomic_folder"
ALLOWED = {
    ("benchmarks.journal", "Journal.writer"): GROWS,
    ("data.videos.writing", "Tables.write"): INSIDE,
    ("data.videos.mp4", "Mp4Writer.__init__"): INSIDE,
    ("data.videos.writing", "put_frames"): INSIDE,
    ("data.videos.writing", "write_palette_png"): INSIDE,
    ("training.report", "Report.say"): GROWS,
    ("training.report", "Report.metrics"): GROWS,
    ("training.meters", "Unreadable.note"): GROWS,
    ("training.not_finite", "NotFinite.loss"): GROWS,
    ("training.loggers", "set_torn_parts_aside"): "renames what wandb has written",
    ("data.indexing", "_atomic_parquet.add"): INSIDE,
    ("data.mapped", "_make"): INSIDE,
    ("data.store.writer", "_lock"): "makes an empty file",
    ("data.store.writer", "_repair_shard"): GROWS,
    ("data.store.writer", "StoreWriter._open_shard"): GROWS,
    ("data.store.writer", "StoreWriter.skip"): GROWS,
    ("data.synthetic.videos", "mp4_bytes"): "writes into memory",
    ("report", "_curve"): "writes into memory",
    ("report", "_jpeg"): "writes into memory",
    ("train", "learn"): "calls checkpoint.save",
    ("models.merging.formats", "save_pickled"): INSIDE,
    ("models.chassis.sam3_pt", "_write"): INSIDE,
    ("models.chassis.sam3_pt", "_save"): INSIDE,
    ("models.chassis.find", "_make.write"): INSIDE,
    ("models.exporting.onnx_files", "write_onnx"): INSIDE,
    ("models.exporting.precision", "to_fp16"): INSIDE,
    ("benchmarks.vos", "PredictionFolder.add"): INSIDE,
    ("benchmarks.pictures.video_predictions", "Tracks.add"): "writes into a temporary folder",
    ("benchmarks.vos", "PredictionFolder.finish"): INSIDE,
}


def writing(code):
    """Yield (function or class, call) for each write in some code that is not inside `with atomic_...`."""

    def walk(node, inside, name):
        if isinstance(node, ast.With):
            inside |= any("atomic_f" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{name}.{node.name}" if name else node.name
        if isinstance(node, ast.Call) and not inside and writes(node):
            yield name, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, name)

    return walk(ast.parse(code), False, "")


def writes(call):
    """Whether a call writes a file by its path, opens one for writing, or renames one."""
    last = ast.unparse(call.func).rpartition(".")[2]
    if last in ("open", "fdopen"):
        values = [one.value for one in ast.walk(call) if isinstance(one, ast.Constant)]
        modes = [one for one in values if isinstance(one, str) and set(one) <= set("rwaxbt+") and len(one) < 4]
        return any(set(mode) & set("wax+") for mode in modes) or "O_CREAT" in ast.unparse(call)
    if not isinstance(call.func, ast.Attribute):  # such as files.write_text
        return last == "save_file"
    if last == "replace":  # of a path; a text's has two arguments, a dataclass's has names
        return ast.unparse(call.func) == "os.replace" or (len(call.args) == 1 and not call.keywords)
    return last in WRITERS


def test_nothing_writes_but_files():
    found = {
        (".".join(file.relative_to(PACKAGE).with_suffix("").parts), name): call
        for file in PACKAGE.rglob("*.py")
        if file != PACKAGE / "files.py"
        for name, call in writing(file.read_text(encoding="utf-8"))
    }
    assert {place: call for place, call in found.items() if place not in ALLOWED} == {}
    assert ALLOWED.keys() - found.keys() == set(), "these write no more"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(path, 'w')", 1),
        ("path.open('ab')", 1),
        ("os.open(path, os.O_CREAT)", 1),
        ("path.write_text('x')", 1),
        ("figure.savefig(path)", 1),
        ("os.replace(one, two)", 1),
        ("one.replace(two)", 1),
        ("save_file(tensors, path)", 1),
        ("with atomic_file(path) as file:\n image.save(file)\nimage.save(path)", 1),
        ("def f():\n with a, atomic_folder(path) as folder:\n  (folder / 'x').write_text('')", 0),
        ("write_text(path, text); text.replace('a', 'b'); replace(row, name=1)", 0),
        ("open(path); open(path, 'rb'); Image.open(path); av.open(path, errors='replace')", 0),
    ],
)
def test_the_rule_can_fail(code, found):
    assert len(list(writing(code))) == found
