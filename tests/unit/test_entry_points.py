import sys
from pathlib import Path

import pytest

from trt_int8.entry_points import import_entry_point, source_file, split_entry_point
from trt_int8.errors import ConfigError


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that become importable in a test are forgotten after it."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("package.module:factory", ("package.module", "factory")),
        ("module:Class.method", ("module", "Class.method")),
        ("some folder/file.py:factory", ("some folder/file.py", "factory")),
        ("model.onnx", None),
        ("runs/a:b/model.onnx", None),
        ("not a module:name", None),
        ("module:", None),
        (":name", None),
    ],
)
def test_entry_points_are_told_from_paths(spec: str, parts: tuple[str, str] | None) -> None:
    """Only a module or a .py file, a colon and a name make an entry point."""
    assert split_entry_point(spec) == parts


def test_dotted_names_reach_into_classes(tmp_path: Path) -> None:
    """`file.py:Class.method` names a method."""
    (tmp_path / "mine.py").write_text("class Models:\n    @staticmethod\n    def small():\n        return 'small'\n")

    assert import_entry_point(f"{tmp_path}/mine.py:Models.small", "the model")() == "small"


def test_files_of_one_name_do_not_displace_each_other(tmp_path: Path) -> None:
    """Two files called mine.py in two folders are two modules."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"NAME = {name!r}\n")

    assert import_entry_point(f"{tmp_path}/first/mine.py:NAME", "the model") == "first"
    assert import_entry_point(f"{tmp_path}/second/mine.py:NAME", "the model") == "second"


@pytest.mark.parametrize("spec", ["{folder}/needy.py:factory", "needy:factory"])
def test_missing_import_of_the_users_module_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    """A module that exists and imports something missing raises its own error, with its own traceback."""
    (tmp_path / "needy.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        import_entry_point(spec.format(folder=tmp_path), "the model")
    assert caught.traceback[-1].path == tmp_path / "needy.py"


def test_submodule_that_is_not_there_is_named() -> None:
    """A package that exists without the module asked for is a matter of the spelling."""
    with pytest.raises(ConfigError, match=r"there is no module 'json\.models'"):
        import_entry_point("json.models:factory", "the model")


def test_what_a_module_defines_is_listed_where_nothing_is_close(tmp_path: Path) -> None:
    """A name that resembles none is answered with those there are."""
    (tmp_path / "mine.py").write_text("def small(): ...\ndef large(): ...\n")

    with pytest.raises(ConfigError, match=r"has no 'xyz'; it defines small, large"):
        import_entry_point(f"{tmp_path}/mine.py:xyz", "the model")


def test_spec_of_another_form_is_refused() -> None:
    """A text without a colon is not imported."""
    with pytest.raises(ConfigError, match=r"'factory' is neither package\.module:name nor path/to/file\.py:name"):
        import_entry_point("factory", "the model")


def test_source_file_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file behind an entry point is found by path and by module name, and its code is not run."""
    file = tmp_path / "never_run.py"
    file.write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)

    assert source_file(f"{file}:net") == file
    assert source_file("never_run:net") == file


@pytest.mark.parametrize("spec", ["model.onnx", "gone.py:net", "no_such_module:net", "no_such.module:net", "sys:net"])
def test_source_file_is_none_where_there_is_none(spec: str) -> None:
    """A plain path, a module that is not there and a built-in one have no source file."""
    assert source_file(spec) is None
