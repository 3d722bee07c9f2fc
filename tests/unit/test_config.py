import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from engines.runner import TensorSpec
from trt_int8.config import InputConfig, ModelConfig, RunConfig, load_config, load_preprocessing
from trt_int8.errors import ConfigError, FileAccessError
from trt_int8.images import Preprocessing
from trt_int8.settings import validated

MODEL: dict[str, Any] = {"source": "package.models:net", "inputs": [{"name": "image", "shape": [1, 3, 8, 8]}]}
DATA: dict[str, Any] = {"calibration": "package.data:batches"}


def write(folder: Path, **sections: Any) -> Path:
    """Write a configuration that is whole but for what `sections` replaces."""
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"model": MODEL, "data": DATA, **sections}))
    return file


def test_two_sections_are_enough(tmp_path: Path) -> None:
    """A model and calibration data make a configuration; the rest has the defaults of the command line."""
    config = load_config(write(tmp_path))

    assert config.data.max_batches == 1000
    assert config.calibrate.tensors == "quantized"
    assert config.quantize.method == "entropy"
    assert config.quantize.percentile == 99.99
    assert config.quantize.residual == "int8"
    assert config.model.opset == 20
    assert config.output == Path("runs/mine")


def test_empty_sections_have_their_defaults(tmp_path: Path) -> None:
    """A section whose keys are all commented out, null in YAML, is as if it were not there."""
    assert load_config(write(tmp_path, benchmark=None)) == load_config(write(tmp_path))


def test_values_of_the_file_win_over_defaults(tmp_path: Path) -> None:
    """What is written is what is read."""
    config = load_config(
        write(tmp_path, quantize={"methods": ["mse", "minmax"], "method": "mse", "exclude": ["^head/"], "fp16": False})
    )

    assert config.quantize.methods == ("mse", "minmax")
    assert config.quantize.exclude == ("^head/",)
    assert config.quantize.fp16 is False


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    """Nothing a stage does can alter the settings of the next one."""
    config = load_config(write(tmp_path))

    with pytest.raises(ValueError, match="frozen"):
        config.quantize.method = "mse"


class TestRefusals:
    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"quantise": {}}, r"unknown key quantise \(did you mean 'quantize'\? valid here: model, data, calibrate"),
            (
                {"quantize": {"percentil": 99.9}},
                r"unknown key quantize\.percentil \(did you mean 'percentile'\? valid here: methods, method, ",
            ),
            (
                {"model": {**MODEL, "inputs": [{"name": "image", "shap": [1], "shape": [1]}]}},
                r"unknown key model\.inputs\[0\]\.shap \(did you mean 'shape'\? valid here: name, shape, ",
            ),
            (
                {"data": {**DATA, "preprocessing": {"men": [0, 0, 0]}}},
                r"unknown key data\.preprocessing\.men \(did you mean 'mean'\?",
            ),
            (
                {"benchmark": {"zzz": 1}},
                r"unknown key benchmark\.zzz \(valid here: rounds, budget_s, warmup_s, threads, shapes\)",
            ),
            ({"benchmark": {"rounds": "ten"}}, r"benchmark\.rounds is 'ten', expected a whole number\.$"),
            ({"benchmark": {"rounds": 2.5}}, r"benchmark\.rounds is 2\.5, expected a whole number"),
            ({"benchmark": {"rounds": True}}, r"benchmark\.rounds is True, expected a whole number"),
            ({"benchmark": {"rounds": 0}}, r"benchmark\.rounds is 0, expected at least 5"),
            ({"benchmark": {"budget_s": 0}}, r"benchmark\.budget_s is 0, expected more than 0"),
            ({"benchmark": {"budget_s": True}}, r"benchmark\.budget_s is True, expected a number"),
            ({"benchmark": 5}, r"benchmark is 5, expected a mapping"),
            ({"quantize": {"percentile": 101}}, r"quantize\.percentile is 101, expected at most 100"),
            ({"quantize": {"percentile": "high"}}, r"quantize\.percentile is 'high', expected a number"),
            ({"quantize": {"fp16": "perhaps"}}, r"quantize\.fp16 is 'perhaps', expected true or false"),
            ({"quantize": {"method": "entropie"}}, r"quantize\.method is 'entropie', expected 'minmax', 'entropy', "),
            ({"quantize": {"methods": "minmax"}}, r"quantize\.methods is 'minmax', expected a list"),
            ({"build": {"precisions": ["int4"]}}, r"build\.precisions\[0\] is 'int4', expected 'fp32', 'tf32', 'fp16'"),
            ({"build": {"precisions": ["int8"]}}, r"build: precisions is \['int8'\], expected fp32 among them"),
            ({"build": {"precisions": ["fp32", "fp32"]}}, r"build: precisions is .*, expected each only once"),
            ({"build": {"batch": [1, 8, 4]}}, r"build: batch is \[1, 8, 4\], expected it in ascending order"),
            ({"build": {"batch": [1, 8]}}, r"build\.batch"),
            ({"build": {"optimization_level": 6}}, r"build\.optimization_level is 6, expected at most 5"),
            ({"build": {"shapes": {"x": {"min": [1], "opt": [1]}}}}, r"build\.shapes\.x\.max is missing"),
            (
                {"build": {"batch": [1, 1, 1], "shapes": {"x": {"min": [1], "opt": [1], "max": [1]}}}},
                r"build: batch and shapes are both given",
            ),
            ({"build": {"hardware_compatibility": "all"}}, r"build\.hardware_compatibility is 'all', expected 'none'"),
            ({"quantize": {"exclude": ["("]}}, r"quantize: exclude holds '\(', which is no regular expression: "),
            ({"quantize": {"include": ["("]}}, r"quantize: include holds '\(', which is no regular expression: "),
            (
                {"quantize": {"methods": ["entropy", "mse", "mse"]}},
                r"quantize: methods is \['entropy', 'mse', 'mse'\], expected each only once",
            ),
            (
                {"quantize": {"targets": ["cpu", "cpu"]}},
                r"quantize: targets is \['cpu', 'cpu'\], expected each only once",
            ),
            (
                {"quantize": {"methods": ["minmax"]}},
                r"quantize: method is 'entropy', expected one of methods: minmax",
            ),
            (
                {"quantize": {"activations": "affine", "targets": ["tensorrt"]}},
                r"quantize: activations is 'affine', expected cpu among targets",
            ),
            (
                {"quantize": {"residual": "float", "targets": ["cpu"]}},
                r"quantize: residual is 'float', expected tensorrt among targets",
            ),
            (
                {"quantize": {"attention": "int8", "targets": ["cpu"]}},
                r"quantize: attention is 'int8', expected tensorrt among targets",
            ),
            (
                {"calibrate": {"tensors": "tensorrt"}},
                r"calibrate\.tensors is 'tensorrt' and quantize\.targets holds 'cpu', .*: expected quantized",
            ),
            (
                {"calibrate": {"tensors": "tensorrt"}, "quantize": {"targets": ["tensorrt"], "residual": "float"}},
                r"calibrate\.tensors is 'tensorrt', .* quantize\.residual is not the default one: expected quantized",
            ),
            ({"quantize": {"modes": ["dynamic"]}}, r"quantize: modes is \['dynamic'\], expected static among them"),
            ({"data": {"calibration": 3}}, r"data\.calibration is 3, expected text"),
            ({"data": {}}, r"data\.calibration is missing"),
            ({"data": {**DATA, "preprocessing": {"resize": "q"}}}, r"resize is 'q', expected a whole number or a list"),
            (
                {"data": {**DATA, "preprocessing": {"mean": [0.5]}}},
                r"preprocessing: mean has 1 numbers; color RGB needs 3",
            ),
            ({"model": {"source": "package.models:net"}}, r"model: inputs is missing: a factory's model does not say"),
            (
                {"model": {**MODEL, "strip_prefix": "net."}},
                r"model: checkpoint is missing, and checkpoint_key or strip_",
            ),
            ({"model": {"source": "net.pth"}}, r"model: source is 'net\.pth', expected package\.module:factory"),
            (
                {"model": {"source": "net.onnx", "opset": 21}},
                r"model: opset cannot be set for 'net\.onnx', which holds that itself",
            ),
            (
                {"model": {"source": "net.pt2", "checkpoint": "net.pt"}},
                r"model: checkpoint cannot be set for 'net\.pt2', which holds that itself",
            ),
            (
                {"model": {**MODEL, "inputs": [{"name": "x", "shape": [1, 3], "dynamic": {2: "width"}}]}},
                r"model\.inputs\[0\]: dynamic names axis 2, and shape \[1, 3\] has 2 axes",
            ),
        ],
    )
    def test_each_mistake_is_named_with_its_path(self, sections: dict[str, Any], message: str) -> None:
        """Key, value and what was expected, in one line that starts with the file."""
        with pytest.raises(ConfigError, match=message) as caught:
            validated(RunConfig, {"model": MODEL, "data": DATA, **sections}, "'mine.yaml'")

        assert str(caught.value).startswith("Cannot use 'mine.yaml': ")
        assert "\n" not in str(caught.value)

    def test_all_mistakes_are_told_at_once(self, tmp_path: Path) -> None:
        """Three mistakes take one attempt, not three."""
        file = write(tmp_path, benchmark={"rounds": 0, "round": 3}, output=7)

        with pytest.raises(
            ConfigError, match=r"unknown key benchmark\.round .*; benchmark\.rounds is 0.*; output is 7"
        ):
            load_config(file)

    def test_long_values_are_cut(self) -> None:
        """A value of a thousand letters does not bury the message."""
        with pytest.raises(ConfigError, match=r"data is 'x") as caught:
            validated(RunConfig, {"model": MODEL, "data": "x " * 500}, "'mine.yaml'")

        assert len(str(caught.value)) < 150

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model:\n  source: [a, b\ndata: 3\n", r"mine\.yaml': it is not YAML: line 3, column 5: "),
            ("model: {a: 1\n", r"it is not YAML: line 2, column 1: "),
            ("", r"mine\.yaml': it is empty; expected keys and values"),
            ("# nothing yet\n", r"it is empty"),
            ("- model\n", r"it holds a list; expected keys and values"),
            ("\x00", r"it is not YAML: "),
        ],
    )
    def test_what_is_no_yaml_is_named_with_its_line(self, tmp_path: Path, text: str, message: str) -> None:
        """A syntax error is one line with the place of the mistake."""
        (tmp_path / "mine.yaml").write_text(text)

        with pytest.raises(ConfigError, match=message) as caught:
            load_config(tmp_path / "mine.yaml")
        assert "\n" not in str(caught.value)

    def test_missing_configuration_is_named(self, tmp_path: Path) -> None:
        """A configuration that is not there is an error of access."""
        with pytest.raises(FileAccessError, match=r"Cannot read the configuration: there is no file '.*mine\.yaml'"):
            load_config(tmp_path / "mine.yaml")


class TestFiles:
    def test_paths_start_at_the_folder_of_the_configuration(self, tmp_path: Path) -> None:
        """Moving a configuration together with its files changes nothing; entry points are not paths."""
        (tmp_path / "weights.pt").touch()
        np.savez(tmp_path / "calibration.npz", x=np.zeros(1))
        (tmp_path / "mine.py").touch()
        config = load_config(
            write(
                tmp_path,
                model={**MODEL, "checkpoint": "weights.pt"},
                data={"calibration": "calibration.npz", "evaluation": "mine.py:batches"},
                output="results",
            )
        )

        assert config.model.source == "package.models:net"
        assert config.model.checkpoint == tmp_path / "weights.pt"
        assert config.data.calibration == str(tmp_path / "calibration.npz")
        assert config.data.evaluation == f"{tmp_path}/mine.py:batches"
        assert config.output == tmp_path / "results"

    def test_absolute_paths_stay(self, tmp_path: Path) -> None:
        """An absolute path is taken as it is."""
        (tmp_path / "elsewhere").mkdir()
        np.savez(tmp_path / "data.npz", x=np.zeros(1))
        config = load_config(write(tmp_path / "elsewhere", data={"calibration": str(tmp_path / "data.npz")}))

        assert config.data.calibration == str(tmp_path / "data.npz")

    def test_missing_files_are_found_before_anything_is_done(self, tmp_path: Path) -> None:
        """Every file that is not there is named with its key; data made by code cannot be looked for."""
        file = write(
            tmp_path,
            model={**MODEL, "source": "net.py:factory", "checkpoint": "weights.pt"},
            data={"calibration": "calibration.npz", "evaluation": "package.data:batches"},
        )

        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert str(caught.value) == (
            f"Cannot use '{file}': model.source: there is no '{tmp_path}/net.py'; "
            f"model.checkpoint: there is no '{tmp_path}/weights.pt'; "
            f"data.calibration: there is no '{tmp_path}/calibration.npz'. "
            "Relative paths start at the folder of the configuration."
        )

    def test_images_without_preprocessing_are_found_before_anything_is_done(self, tmp_path: Path) -> None:
        """A folder of images is refused at once where nothing says how they become input."""
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")

        with pytest.raises(ConfigError, match=r"data\.preprocessing is missing: '.*images' is a folder of images"):
            load_config(write(tmp_path, data={"calibration": "images"}))

    def test_preprocessing_is_for_the_image_folders_among_the_data(self, tmp_path: Path) -> None:
        """Arrays beside a folder of images are fed as they are."""
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
        np.savez(tmp_path / "test.npz", image=np.zeros((1, 3, 8, 8)))
        data = {"calibration": "images", "evaluation": "test.npz", "preprocessing": {"resize": 8}}
        config = load_config(write(tmp_path, data=data)).data

        assert config.preprocessing_for(config.calibration) == Preprocessing(resize=8)
        assert config.preprocessing_for(str(config.evaluation)) is None


class TestOverrides:
    def test_override_wins_over_the_file(self, tmp_path: Path) -> None:
        """Values are YAML: numbers, lists and null mean what they mean in the file."""
        file = write(tmp_path, quantize={"method": "mse"}, data={**DATA, "max_batches": 10})
        overrides = ["quantize.method=minmax", "quantize.methods=[minmax, mse]", "data.max_batches=null", "output=out"]
        config = load_config(file, overrides)

        assert config.quantize.method == "minmax"
        assert config.quantize.methods == ("minmax", "mse")
        assert config.data.max_batches is None
        assert config.output == Path("out")

    def test_override_makes_sections_that_are_missing(self, tmp_path: Path) -> None:
        """A key may be set in a section that the file does not have, or has as null."""
        config = load_config(write(tmp_path, accuracy=None), ["accuracy.max_samples=5", "data.preprocessing.crop=224"])

        assert config.accuracy.max_samples == 5
        assert config.data.preprocessing == Preprocessing(crop=224)

    def test_values_may_hold_equals_signs(self, tmp_path: Path) -> None:
        """Only the first sign of equality divides."""
        assert load_config(write(tmp_path), ["data.data_id=a=b"]).data.data_id == "a=b"

    def test_paths_in_overrides_start_at_the_current_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the shell completes is what is opened."""
        (tmp_path / "configs").mkdir()
        np.savez(tmp_path / "data.npz", x=np.zeros(1))
        monkeypatch.chdir(tmp_path)

        assert load_config(write(tmp_path / "configs"), ["data.calibration=data.npz"]).data.calibration == "data.npz"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("quantize.methd=mse", r"unknown key quantize\.methd \(did you mean 'method'"),
            ("quantise.method=mse", r"unknown key quantise \(did you mean 'quantize'\?"),
            ("quantize.method", r"--set 'quantize\.method': expected section\.key=value"),
            ("=mse", r"expected section\.key=value"),
            ("quantize..method=mse", r"expected section\.key=value"),
            ("quantize.methods=[mse", r"its value is not YAML: line 1, column 5"),
            ("data.calibration.path=x", r"'calibration' holds 'package\.data:batches', which has no keys"),
        ],
    )
    def test_mistakes_in_overrides_are_refused(self, tmp_path: Path, override: str, message: str) -> None:
        """An override is checked as the file is."""
        with pytest.raises(ConfigError, match=message):
            load_config(write(tmp_path), [override])


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "value"), [("1/255", 1 / 255), ("1e-3", 0.001), ("1", 1.0), ("0.5", 0.5), ("2.5e1", 25.0)]
    )
    def test_numbers_are_read_as_they_are_written(self, tmp_path: Path, text: str, value: float) -> None:
        """Fractions, and 1e-3 that YAML takes for text, are numbers."""
        (tmp_path / "images.yaml").write_text(f"scale: {text}\n")

        assert load_preprocessing(tmp_path / "images.yaml").scale == value

    @pytest.mark.parametrize("text", ["1/0", ".nan", ".inf", "0", "true", "[1]"])
    def test_other_values_are_no_numbers(self, tmp_path: Path, text: str) -> None:
        """A division by zero, NaN, infinity, zero, true and a list do not scale pixels."""
        (tmp_path / "images.yaml").write_text(f"scale: {text}\n")

        with pytest.raises(ConfigError, match=r"images\.yaml': scale is .*, expected"):
            load_preprocessing(tmp_path / "images.yaml")


class TestModel:
    @pytest.mark.parametrize(
        ("source", "kind"),
        [("package.models:net", "factory"), ("nets/mine.py:net", "factory"), ("net.pt2", "pt2"), ("net.ONNX", "onnx")],
    )
    def test_kind_follows_from_the_source(self, source: str, kind: str) -> None:
        """The form of `source` says what is loaded."""
        inputs = (InputConfig(name="x", shape=(1,)),) if kind == "factory" else ()

        assert ModelConfig(source=source, inputs=inputs).kind == kind

    def test_inputs_declare_their_free_axes(self) -> None:
        """The batch is free by default, other axes on request, and none in a scalar or where {} says so."""
        image = InputConfig(name="image", shape=(2, 3, 64, 48), dynamic={0: "batch", 3: "width"})

        assert image.spec() == TensorSpec("image", np.dtype("float32"), ("batch", 3, 64, "width"))
        assert InputConfig(name="ids", shape=(1, 7), dtype="int64").spec().shape == ("batch", 7)
        assert InputConfig(name="t", shape=()).spec().shape == ()
        assert InputConfig(name="x", shape=(1, 7), dynamic={}).spec().shape == (1, 7)


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    """The manifest's form is plain JSON with every default, and makes the same configuration again."""
    preprocessing = {"resize": [256, 300], "crop": 224, "mean": [0.5, 0.5, 0.5]}
    config = load_config(write(tmp_path, data={**DATA, "preprocessing": preprocessing}))
    text = json.dumps(config.resolved())

    assert json.loads(text)["quantize"]["percentile"] == 99.99
    assert validated(RunConfig, json.loads(text), "the manifest") == config


def test_schema_describes_every_key() -> None:
    """The JSON schema for editors is made from the fields: every key has a description and no other key is allowed."""
    schema = RunConfig.model_json_schema()
    sections = [schema, *schema["$defs"].values()]

    assert len(sections) == 11
    for section in sections:
        assert section["additionalProperties"] is False
        assert all(entry.get("description") for entry in section["properties"].values()), section["title"]
