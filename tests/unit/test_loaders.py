import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from polygraphy.json import save_json

from engines.runner import TensorSpec
from trt_int8.data import DataBatch, open_data
from trt_int8.errors import ConfigError, DataError, FileAccessError

FLOAT = np.dtype("float32")
X = TensorSpec("x", FLOAT, ("batch", 2))
IDS = TensorSpec("ids", np.dtype("int64"), ("batch", "length"))
ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that become importable in a test are forgotten after it."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


def fed(batches: list[DataBatch]) -> list[list[list[float]]]:
    return [batch.feeds["x"].tolist() for batch in batches]


@pytest.fixture
def batch_folder(tmp_path: Path) -> Path:
    """Three files of 2, 3 and 1 rows, written in another order than that of their names."""
    for name, part in (("b", ROWS[2:5]), ("c", ROWS[5:]), ("a", ROWS[:2])):
        np.savez(tmp_path / f"{name}.npz", x=part, label=np.arange(len(part)))
    (tmp_path / ".hidden.npz").write_text("left by an editor")
    (tmp_path / "README.txt").write_text("not data")
    return tmp_path


class TestFolder:
    def test_files_are_batches_in_the_order_of_their_names(self, batch_folder: Path) -> None:
        """Each file is fed as it is, never split or joined; hidden and other files do not count."""
        source = open_data(batch_folder, [X])

        assert (source.batches, source.batch_size) == (3, None)
        assert fed(list(source)) == [ROWS[:2].tolist(), ROWS[2:5].tolist(), ROWS[5:].tolist()]
        assert [batch.extras["label"].tolist() for batch in source] == [[0, 1], [0, 1, 2], [0]]

    def test_only_one_file_is_open_at_a_time(self, batch_folder: Path) -> None:
        """A broken last file does not keep the first batches from being read: nothing is loaded ahead."""
        (batch_folder / "c.npz").write_text("damaged")
        batches = iter(open_data(batch_folder, [X]))
        next(batches)
        next(batches)

        with pytest.raises(DataError, match=r"c\.npz': it is not an \.npz file"):
            next(batches)

    def test_max_batches_takes_the_first_files(self, batch_folder: Path) -> None:
        """Two batches are the first two files, and only these are hashed."""
        source = open_data(batch_folder, [X], max_batches=2)
        before = source.data_hash
        (batch_folder / "c.npz").unlink()

        assert source.batches == 2
        assert open_data(batch_folder, [X], max_batches=2).data_hash == before

    def test_batch_size_cannot_be_asked_of_it(self, batch_folder: Path) -> None:
        """An explicit batch size with a folder of batches is a usage error."""
        with pytest.raises(ConfigError, match=r"comes in batches already.*batch size of 4"):
            open_data(batch_folder, [X], batch_size=4)

    def test_a_misfit_names_its_file(self, batch_folder: Path) -> None:
        """The file with the wrong shape is named, with both shapes."""
        np.savez(batch_folder / "b.npz", x=np.zeros((2, 5), np.float32))

        with pytest.raises(DataError, match=r"b\.npz': input 'x' has shape \(2, 5\); the model expects x: float32"):
            list(open_data(batch_folder, [X]))

    def test_npy_files_feed_a_model_of_one_input(self, tmp_path: Path) -> None:
        """A lone array needs no name."""
        np.save(tmp_path / "0.npy", ROWS[:4])
        np.save(tmp_path / "1.npy", ROWS[4:])

        assert fed(list(open_data(tmp_path, [X]))) == [ROWS[:4].tolist(), ROWS[4:].tolist()]

    def test_npy_files_cannot_feed_two_inputs(self, tmp_path: Path) -> None:
        """With two inputs an .npy file does not say which one it holds."""
        np.save(tmp_path / "0.npy", ROWS)

        with pytest.raises(
            DataError, match=r"0\.npy': an \.npy file holds one array, and the model takes x: .*; ids: "
        ):
            open_data(tmp_path, [X, IDS])

    def test_file_that_is_no_npy_is_refused(self, tmp_path: Path) -> None:
        """A renamed text file gets one clear line."""
        (tmp_path / "0.npy").write_text("samples")

        with pytest.raises(DataError, match=r"0\.npy': it is not an \.npy file of a plain array"):
            open_data(tmp_path, [X])

    def test_polygraphy_directory_is_streamed(self, tmp_path: Path) -> None:
        """A directory that Polygraphy wrote, one file per iteration, is a folder of batches."""
        for index in range(3):
            save_json({"x": ROWS[index : index + 1]}, str(tmp_path / f"{index:010}.json"))

        assert fed(list(open_data(tmp_path, [X]))) == [[row] for row in ROWS[:3].tolist()]

    def test_file_of_several_batches_in_a_folder_is_refused(self, tmp_path: Path) -> None:
        """A file of a folder is one batch; a list of them is to be named itself."""
        save_json([{"x": ROWS[:2]}, {"x": ROWS[2:]}], str(tmp_path / "inputs.json"))

        with pytest.raises(DataError, match=r"inputs\.json': it holds 2 batches, and each file of a folder is one"):
            open_data(tmp_path, [X])

    def test_folder_without_data_is_refused(self, tmp_path: Path) -> None:
        """An empty folder says what was looked for."""
        with pytest.raises(DataError, match=r"holds no \.npz, \.npy or \.json batch files and no images"):
            open_data(tmp_path, [X])

    def test_fixed_batch_takes_a_short_file_only_at_the_end(self, batch_folder: Path) -> None:
        """Files of 2, 3 and 1 rows cannot be the batches of a model that fixes 3."""
        with pytest.raises(DataError, match=r"a\.npz': it has 2 samples; the model's batch is fixed at 3"):
            open_data(batch_folder, [TensorSpec("x", FLOAT, (3, 2))])
        (batch_folder / "a.npz").unlink()

        batches = list(open_data(batch_folder, [TensorSpec("x", FLOAT, (3, 2))]))
        assert [batch.samples for batch in batches] == [3, 1]
        assert batches[1].feeds["x"].tolist() == [ROWS[5].tolist()] * 3


class TestPolygraphy:
    def test_saved_inputs_are_read(self, tmp_path: Path) -> None:
        """What `--save-inputs` writes, a list of dicts, comes out batch by batch."""
        save_json([{"x": ROWS[:2]}, {"x": ROWS[2:]}], str(tmp_path / "inputs.json"))
        source = open_data(tmp_path / "inputs.json", [X])

        assert source.batches == 2
        assert fed(list(source)) == [ROWS[:2].tolist(), ROWS[2:].tolist()]

    @pytest.mark.parametrize("text", ["{x", '["no inputs"]', "7"])
    def test_other_json_is_refused(self, tmp_path: Path, text: str) -> None:
        """Anything but inputs by name is refused in one line."""
        (tmp_path / "inputs.json").write_text(text)

        with pytest.raises(DataError, match=r"it is not a file of inputs that Polygraphy saved with --save-inputs"):
            open_data(tmp_path / "inputs.json", [X])

    def test_data_loader_script_is_run(self, tmp_path: Path) -> None:
        """A script's load_data() is called anew for every pass, and modules beside it can be imported."""
        (tmp_path / "rows_beside.py").write_text("ROWS = [[1.0, 2.0], [3.0, 4.0]]\n")
        (tmp_path / "loader.py").write_text(
            "import numpy as np\nfrom rows_beside import ROWS\n"
            "def load_data():\n    for row in ROWS:\n        yield {'x': np.array([row], np.float32)}\n"
        )
        source = open_data(tmp_path / "loader.py", [X])

        assert fed(list(source)) == fed(list(source)) == [[[1.0, 2.0]], [[3.0, 4.0]]]

    def test_script_without_load_data_is_refused(self, tmp_path: Path) -> None:
        """A script without load_data() is told about the other way to name a function."""
        (tmp_path / "loader.py").write_text("def batches(): ...\n")

        with pytest.raises(ConfigError, match=r"no function load_data\(\).*loader\.py:FUNCTION"):
            open_data(tmp_path / "loader.py", [X])


class TestEntryPoint:
    def test_function_in_a_file_yields_batches(self, tmp_path: Path) -> None:
        """`file.py:function` is called without arguments, and again for another pass."""
        (tmp_path / "mine.py").write_text(
            "import numpy as np\ndef batches():\n    yield {'x': np.ones((1, 2)), 'label': [4]}\n"
        )
        source = open_data(f"{tmp_path}/mine.py:batches", [X])

        assert fed(list(source)) == fed(list(source)) == [[[1.0, 1.0]]]
        assert [batch.extras["label"].tolist() for batch in source] == [[4]]
        assert (source.batches, source.data_hash) == (None, None)

    def test_module_in_the_current_folder_is_found(self, tmp_path: Path) -> None:
        """`package.module:function` works from the folder of the package, as `python -m` would."""
        (tmp_path / "mypackage").mkdir()
        (tmp_path / "mypackage" / "data.py").write_text("def batches():\n    return [{'x': [[1.0, 2.0]]}]\n")
        code = (
            "import numpy as np; from engines.runner import TensorSpec; from trt_int8.data import open_data\n"
            "spec = TensorSpec('x', np.dtype('float32'), ('batch', 2))\n"
            "print([b.feeds['x'].tolist() for b in open_data('mypackage.data:batches', [spec])])"
        )
        script = tmp_path / "elsewhere" / "script.py"
        script.parent.mkdir()
        script.write_text(code)
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)

        assert done.stdout.strip() == "[[[1.0, 2.0]]]", done.stderr

    def test_exceptions_of_the_users_code_pass_unchanged(self, tmp_path: Path) -> None:
        """A bug in the user's generator is not dressed up: its own exception and traceback arrive."""
        (tmp_path / "mine.py").write_text("def batches():\n    yield {}['no such key']\n")

        with pytest.raises(KeyError, match="no such key") as caught:
            list(open_data(f"{tmp_path}/mine.py:batches", [X]))
        assert caught.traceback[-1].path == tmp_path / "mine.py"

    def test_unknown_function_names_a_close_one(self, tmp_path: Path) -> None:
        """A misspelt function is told the one that was probably meant."""
        (tmp_path / "mine.py").write_text("def batches(): ...\n")

        with pytest.raises(ConfigError, match=r"has no 'batchs'; did you mean 'batches'\?"):
            open_data(f"{tmp_path}/mine.py:batchs", [X])

    def test_unknown_module_is_named(self) -> None:
        """A module that is not there is named with the folder in which it was looked for."""
        with pytest.raises(ConfigError, match=r"there is no module 'no_such_package'"):
            open_data("no_such_package.data:batches", [X])

    def test_thing_that_is_no_function_is_refused(self, tmp_path: Path) -> None:
        """A list under that name could not be read anew for a second pass."""
        (tmp_path / "mine.py").write_text("batches = [1]\n")

        with pytest.raises(ConfigError, match=r"it is a list; expected a function"):
            open_data(f"{tmp_path}/mine.py:batches", [X])

    def test_function_that_returns_one_dict_is_refused(self, tmp_path: Path) -> None:
        """Returning a single batch instead of a series of them is told apart from batches."""
        (tmp_path / "mine.py").write_text("def batches():\n    return {'x': 1}\n")

        with pytest.raises(DataError, match=r"it returned a dict; expected one batch after the other"):
            list(open_data(f"{tmp_path}/mine.py:batches", [X]))

    def test_an_iterator_that_is_returned_again_is_refused(self, tmp_path: Path) -> None:
        """A second pass would find it used up; generators that are made anew are different ones."""
        (tmp_path / "mine.py").write_text(
            "import numpy as np\nonce = iter([np.zeros((1, 2), np.float32)] * 3)\n"
            "def batches():\n    return once\n\ndef anew():\n    yield np.zeros((1, 2), np.float32)\n"
        )
        source = open_data(f"{tmp_path}/mine.py:batches", [X])
        assert len(list(source)) == 3

        with pytest.raises(DataError, match=r"for more than one pass: it returned the iterator that it had returned"):
            list(source)
        anew = open_data(f"{tmp_path}/mine.py:anew", [X])
        assert [len(list(anew)), len(list(anew))] == [1, 1]

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        """A file that is not there is a matter of the path, not of the import."""
        with pytest.raises(FileAccessError, match=r"no file '.*mine\.py'"):
            open_data(f"{tmp_path}/mine.py:batches", [X])


class TestIterables:
    def test_list_of_dicts_is_read_as_often_as_wanted(self) -> None:
        """A list has a length and can be read twice."""
        source = open_data([{"x": ROWS[:2]}, {"x": ROWS[2:]}], [X])

        assert (source.batches, source.rewindable) == (2, True)
        assert fed(list(source)) == fed(list(source)) == [ROWS[:2].tolist(), ROWS[2:].tolist()]

    def test_generator_is_read_once_and_then_refused_before_its_first_batch(self) -> None:
        """A second pass over a generator is an error when it is started, not an empty stream."""
        source = open_data(({"x": row[None]} for row in ROWS), [X])

        assert len(list(source)) == 6
        with pytest.raises(DataError, match=r"a generator can be read only once"):
            iter(source)

    def test_generator_is_refused_where_several_passes_are_needed(self) -> None:
        """A stage that needs two passes can say so before it starts."""
        source = open_data(iter([{"x": ROWS}]), [X])

        with pytest.raises(DataError, match=r"more than once to compare the methods, and a list_iterator"):
            source.require_rewindable("to compare the methods")
        assert len(list(source)) == 1

    def test_nothing_is_taken_beyond_max_batches(self) -> None:
        """A generator is not asked for a batch that will not be used."""
        taken: list[int] = []

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for index in range(6):
                taken.append(index)
                yield {"x": ROWS[index : index + 1]}

        assert len(list(open_data(batches(), [X], max_batches=2))) == 2
        assert taken == [0, 1]

    def test_reused_buffer_gives_distinct_batches(self) -> None:
        """A generator that overwrites one buffer still gives as many distinct batches as it meant."""
        buffer = np.zeros((1, 2), np.float32)

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for row in ROWS:
                buffer[0] = row
                yield {"x": buffer}

        assert fed(list(open_data(batches(), [X]))) == [[row] for row in ROWS.tolist()]

    def test_data_loader_of_inputs_and_labels(self) -> None:
        """PyTorch's (x, y) batches feed the input and carry the labels along."""
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        loader = DataLoader(TensorDataset(torch.from_numpy(ROWS), torch.arange(6)), batch_size=4)
        source = open_data(loader, [X])
        batches = list(source)

        assert source.batches == 2
        assert fed(batches) == [ROWS[:4].tolist(), ROWS[4:].tolist()]
        assert [batch.extras["label"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
        assert len(list(source)) == 2

    def test_data_loader_without_a_length(self) -> None:
        """A loader over an IterableDataset knows no length and works all the same."""
        import torch
        from torch.utils.data import DataLoader, IterableDataset

        class Rows(IterableDataset[torch.Tensor]):
            def __iter__(self) -> Iterator[torch.Tensor]:
                return iter(torch.from_numpy(ROWS))

        source = open_data(DataLoader(Rows(), batch_size=3), [X])

        assert source.batches is None
        assert fed(list(source)) == [ROWS[:3].tolist(), ROWS[3:].tolist()]

    def test_elements_follow_the_order_of_the_inputs(self) -> None:
        """(x1, x2, y) is mapped by position; labels take the name that was asked for."""
        ids = np.array([[5, 6]])
        batches = list(open_data([(ROWS[:1], ids, [9])], [X, IDS], label="answer"))

        assert batches[0].feeds["ids"].tolist() == [[5, 6]]
        assert batches[0].extras["answer"].tolist() == [9]

    @pytest.mark.parametrize("count", [1, 4])
    def test_wrong_number_of_elements_is_refused(self, count: int) -> None:
        """Too few or too many elements are not guessed at."""
        with pytest.raises(DataError, match=rf"it has {count} elements; the model takes 2 \(x: .*; ids: .*\)"):
            list(open_data([(ROWS,) * count], [X, IDS]))

    def test_bare_tensors_feed_a_model_of_one_input(self) -> None:
        """A loader of plain tensors needs neither names nor tuples."""
        import torch

        assert fed(list(open_data([torch.from_numpy(ROWS)], [X]))) == [ROWS.tolist()]

    def test_no_batches_are_refused(self) -> None:
        """An empty iterable is an error of its own."""
        with pytest.raises(DataError, match=r"a list: it gave no batches"):
            list(open_data([], [X]))

    def test_thing_that_is_no_data_is_refused(self) -> None:
        """A number is neither a path nor batches."""
        with pytest.raises(DataError, match="Cannot use a int as data; expected a path, a mapping of arrays"):
            open_data(7, [X])  # type: ignore[arg-type]
