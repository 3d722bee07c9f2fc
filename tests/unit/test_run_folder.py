"""The manifest of a run, and stages that are done once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_int8.errors import ConfigError
from trt_int8.run_folder import MANIFEST, RunFolder, read_manifest


def folder(path: Path, *, resume: bool = False, files: tuple[str, ...] = ("a.txt",)) -> RunFolder:
    """Open a run's folder."""
    return RunFolder(
        path, title="t", config={"k": 1}, machine={"cpu": "c"}, backend={"name": "b"}, files=files, resume=resume
    )


def writer(run: RunFolder, text: str, calls: list[str]) -> Callable[[], str]:
    """Return a stage that writes `text` to a.txt and notes that it ran."""

    def action() -> str:
        calls.append(text)
        run.path.mkdir(exist_ok=True)
        run.file("a.txt").write_text(text)
        return text

    return action


def test_stage_is_recorded(tmp_path: Path):
    """A finished stage stands in the manifest with its seconds and the SHA-256 of its files."""
    run = folder(tmp_path / "r")
    run.stage("one", {"in": 1}, ["a.txt"], writer(run, "hello", []), lambda: "")
    manifest = read_manifest(tmp_path / "r")

    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert manifest["files"]["a.txt"] == {"sha256": digest, "bytes": 5}
    assert manifest["stages"]["one"]["seconds"] >= 0
    assert manifest["config"] == {"k": 1}


@pytest.mark.parametrize(
    ("resume", "key", "damage", "runs"),
    [
        (True, {"in": 1}, False, 1),
        (False, {"in": 1}, False, 2),
        (True, {"in": 2}, False, 2),
        (True, {"in": 1}, True, 2),
    ],
    ids=["unchanged", "not resumed", "other input", "damaged file"],
)
def test_resume(tmp_path: Path, resume: bool, key: dict, damage: bool, runs: int):
    """A stage is kept only with resume, the same key and undamaged files."""
    calls: list[str] = []
    first = folder(tmp_path)
    first.stage("one", {"in": 1}, ["a.txt"], writer(first, "hello", calls), lambda: "")
    if damage:
        first.file("a.txt").write_text("hullo")
    second = folder(tmp_path, resume=resume)
    result = second.stage("one", key, ["a.txt"], writer(second, "hello", calls), lambda: "restored")

    assert len(calls) == runs
    assert result == ("restored" if runs == 1 else "hello")


def test_stage_without_a_key_is_never_kept(tmp_path: Path):
    """A result that depends on something unknown is made again."""
    calls: list[str] = []
    for resume in (False, True):
        run = folder(tmp_path, resume=resume)
        run.stage("one", None, ["a.txt"], writer(run, "hello", calls), lambda: "restored")

    assert calls == ["hello", "hello"]


@pytest.mark.parametrize(
    ("resume", "key", "finished", "goes_on"),
    [
        (True, {"in": 1}, False, True),
        (False, {"in": 1}, False, False),
        (True, {"in": 2}, False, False),
        (True, None, False, False),
        (True, {"in": 1}, True, False),
    ],
    ids=["interrupted", "not resumed", "other input", "unknown input", "finished"],
)
def test_a_stage_that_began_is_gone_on_with(
    tmp_path: Path, resume: bool, key: dict | None, finished: bool, goes_on: bool
):
    """Only with resume, the same key, and where it did not end; also when another stage was recorded in between."""
    first = folder(tmp_path)
    assert not first.begin("one", {"in": 1})
    if finished:
        first.stage("one", {"in": 1}, ["a.txt"], writer(first, "hello", []), lambda: "")
    second = folder(tmp_path, resume=resume)
    second.stage("zero", {}, [], lambda: None, lambda: None)

    assert second.begin("one", key) == goes_on


def test_stages_of_another_version_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another version of the program may compute otherwise: its stages are made again."""
    calls: list[str] = []
    first = folder(tmp_path)
    first.stage("one", {"in": 1}, ["a.txt"], writer(first, "hello", calls), lambda: "restored")
    monkeypatch.setattr("trt_int8.run_folder.__version__", "999")
    second = folder(tmp_path, resume=True)
    second.stage("one", {"in": 1}, ["a.txt"], writer(second, "hello", calls), lambda: "restored")

    assert calls == ["hello", "hello"]


def test_files_that_a_stage_no_longer_writes_are_removed(tmp_path: Path):
    """A stage that runs again with fewer files takes the others away; files of other stages and strangers stay."""
    first = folder(tmp_path)
    (tmp_path / "b.txt").write_text("old")
    first.stage("one", {"in": 1}, ["a.txt", "b.txt"], writer(first, "hello", []), lambda: "")
    (tmp_path / "mine.txt").write_text("mine")
    second = folder(tmp_path)
    second.stage("one", {"in": 1}, ["a.txt"], writer(second, "hello", []), lambda: "")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", MANIFEST, "mine.txt"]


def test_leftovers_below_a_run_are_removed(tmp_path: Path):
    """In a folder that a run wrote, temporary files of its subfolders go as well."""
    run = folder(tmp_path)
    run.stage("one", {}, ["a.txt"], writer(run, "hello", []), lambda: "")
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / ".mse.abc.part.onnx").write_text("half")
    folder(tmp_path)

    assert list((tmp_path / "methods").iterdir()) == []


def test_strange_files_are_not_replaced(tmp_path: Path):
    """A file that the run would write and no manifest claims is refused; other files are no matter."""
    (tmp_path / "b.txt").write_text("other")
    folder(tmp_path)
    (tmp_path / "a.txt").write_text("mine")

    with pytest.raises(ConfigError, match=r"'a\.txt' is there already"):
        folder(tmp_path)


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path: Path):
    """Temporary files of a process that was killed while writing go when the next run starts."""
    (tmp_path / ".model.abc.part.onnx").write_text("half")
    folder(tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 99})])
def test_damaged_manifest(tmp_path: Path, content: str):
    """A manifest that cannot be read is refused in one line that names it."""
    (tmp_path / MANIFEST).write_text(content)

    with pytest.raises(ConfigError, match=r"manifest\.json"):
        folder(tmp_path)


def test_not_a_run(tmp_path: Path):
    """A folder without a manifest is no run."""
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        read_manifest(tmp_path)


def test_what_a_stage_left_is_removed_where_it_is_no_more(tmp_path: Path) -> None:
    """A run without a stage of the one before takes that stage's files away, and no others."""
    first = folder(tmp_path)
    first.stage("build", {"k": 1}, ["a.engine"], lambda: (tmp_path / "a.engine").write_text("a"), lambda: 0)
    (tmp_path / "mine.txt").write_text("kept")
    second = folder(tmp_path)
    second.drop("build")
    second.drop("unknown")

    assert not (tmp_path / "a.engine").exists()
    assert (tmp_path / "mine.txt").exists()
