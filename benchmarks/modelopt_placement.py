"""Placement for TensorRT beside ModelOpt's on the same graphs, and a reason for each difference.

    python benchmarks/modelopt_placement.py [--modelopt-python PYTHON] [--output FILE.md]    the zoo
    python benchmarks/modelopt_placement.py [...] PATH ...    ONNX files

Every model is prepared once; both tools quantize that file, calibrated by the maximum on the same batches. Compared are
the edges that read a dequantized value, found in the two graphs by the same function: a weighted operator is quantized
where all of its operands are, any other reader where the value comes from a DequantizeLinear, directly or across
operators that only move values. So it does not matter on which side of a MaxPool a pair stands.

Prints, for each model, the nodes that only one of them quantizes, and writes the tables. A kind of difference without a
reason in `modelopt_reasons.REASONS`, or anything that only ours quantizes, is UNEXPLAINED: exit status 1.
ModelOpt is no dependency; where it is missing, this says how to install it, and exits with 0.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from modelopt_reasons import REASONS, Edge, Kinds
from modelopt_runs import HOW_TO_INSTALL, Job, is_there, quantize_all
from numpy.typing import NDArray
from zoo_table import inputs_of

from calibrators.files import write_text
from engines.graph import constant_array, prepare, save_model
from engines.onnxrt import OnnxRuntimeRunner, load_header, tensor_specs
from engines.placement import WEIGHTED, Decision, commutes
from trt_int8.calibration import calibrate
from trt_int8.errors import TrtInt8Error
from trt_int8.quantization import quantize

from zoo.classifiers import CLASSIFIERS  # isort: skip - zoo_table makes it importable
from zoo.exported import EXPORTED  # isort: skip
from zoo.harness import sqnr_db  # isort: skip
from zoo.inputs import Feeds, Input, calibration_batches, held_back_batches  # isort: skip
from zoo.light import LIGHT  # isort: skip
from zoo.predictors import PREDICTORS  # isort: skip
from zoo.unusual import UNUSUAL  # isort: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A model that both tools quantize.

    Attributes:
        name: of the model.
        prepared: the file that both read.
        inputs: what it is fed with.
        ours: the file that trt-int8 writes.
        theirs: the file that ModelOpt writes.
    """

    name: str
    prepared: Path
    inputs: Sequence[Input]
    ours: Path
    theirs: Path


@dataclass(slots=True)
class Graph:
    """What is quantized in a graph with Q/DQ.

    Attributes:
        weighted: names of the weighted nodes all of whose operands are dequantized.
        edges: the other edges that read dequantized values.
        tensors: the tensors before the pairs on activations.
    """

    weighted: set[str] = field(default_factory=set)
    edges: set[Edge] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two placements of one model.

    Attributes:
        name: of the model.
        ours: by trt-int8.
        theirs: by ModelOpt.
        kinds: the differences: kind, then node and input.
        ours_db: the least SQNR of an output against FP32.
        theirs_db: the same of ModelOpt's model.
    """

    name: str
    ours: Graph
    theirs: Graph
    kinds: dict[str, list[str]]
    ours_db: float
    theirs_db: float


def main() -> int:
    """Compare, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="ONNX files; the zoo where there are none")
    parser.add_argument(
        "--modelopt-python", default=sys.executable, metavar="PYTHON", help="an interpreter that has it"
    )
    parser.add_argument("--only", default="", help="of the zoo, only the names that this expression finds")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables; without it they are printed")
    options = parser.parse_args()
    if not is_there(options.modelopt_python):
        print(f"Nothing was compared: {options.modelopt_python}: {HOW_TO_INSTALL}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = list(_cases(options.paths, options.only, folder))
        jobs = [Job(case.prepared, calibration_batches(case.inputs), case.theirs) for case in cases]
        done = quantize_all(options.modelopt_python, jobs, folder)
        found = []
        for case in cases:
            fault = done.faults[case.theirs]
            if fault is not None:
                print(f"{case.name}: ModelOpt wrote nothing: {fault}")
                continue
            try:
                found.append(_compare(case))
            except TrtInt8Error as error:
                print(f"{case.name}: {error}")
    for comparison in found:
        _tell(comparison)
    text = _document(found, done.version)
    if options.output is None:
        print(text)
    else:
        write_text(options.output, text)
    return int(any(kind not in REASONS for comparison in found for kind in comparison.kinds))


def _cases(paths: Sequence[Path], only: str, folder: Path) -> Iterator[Case]:
    """Prepare the models; one that cannot be prepared is told of and left out."""
    made: list[tuple[str, Path, Sequence[Input]]] = []
    for path in paths:
        specs, _ = tensor_specs(load_header(path))
        made.append((path.stem, path, inputs_of(specs)))
    if not paths:
        for architecture in (*CLASSIFIERS, *PREDICTORS, *UNUSUAL, *EXPORTED, *LIGHT):
            if re.search(only, architecture.name):
                path = folder / f"{architecture.name}.onnx"
                made.append((architecture.name, path, architecture.write(path)))
    for name, path, inputs in made:
        ready, ours, theirs = (folder / f"{name}.{kind}.onnx" for kind in ("prepared", "ours", "modelopt"))
        try:
            prepared = prepare(path)
            save_model(prepared.proto, ready)
        except TrtInt8Error as error:
            print(f"{name}: {error}")
            continue
        yield Case(name, ready, inputs, ours, theirs)


def _compare(case: Case) -> Comparison:
    batches = calibration_batches(case.inputs)
    placement = quantize(case.prepared, _calibration(case, batches), output=case.ours, method="minmax").placement
    decisions = {decision.node: decision for decision in placement.decisions}
    ours, theirs = (_graph(path, decisions) for path in (case.ours, case.theirs))
    kinds = Kinds(ir.load(case.prepared), decisions, ours.tensors)
    sorted_out: dict[str, list[str]] = defaultdict(list)
    for node in sorted(ours.weighted - theirs.weighted):
        sorted_out["only ours"].append(f"{kinds.operator(node)} {node}")
    for edge in sorted(ours.edges - theirs.edges, key=str):
        if edge.node not in ours.weighted:
            sorted_out["only ours"].append(f"{kinds.operator(edge.node)} {edge.node} input {edge.index}")
    for node in sorted(theirs.weighted - ours.weighted):
        sorted_out[kinds.of_node(node)].append(f"{kinds.operator(node)} {node}")
    for edge in sorted(theirs.edges - ours.edges, key=str):
        if edge.node not in ours.weighted:
            sorted_out[kinds.of_edge(edge)].append(f"{kinds.operator(edge.node)} {edge.node} input {edge.index}")
    figures = _figures(case)
    return Comparison(case.name, ours, theirs, dict(sorted_out), *figures)


def _calibration(case: Case, batches: Iterable[Feeds]) -> Any:
    return calibrate(case.prepared, batches)


def _graph(path: Path, decisions: dict[str, Decision]) -> Graph:
    """Find what reads dequantized values."""
    found = Graph()
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and not _is_weight(node):
            source = _quantizer(node)
            if source is not None and source.inputs[0] is not None:
                found.tensors.add(source.inputs[0].name or "")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or commutes(node):
            continue
        read = {index: dequantizer for index in range(len(node.inputs)) if (dequantizer := _dequantizer(node, index))}
        if node.op_type in WEIGHTED and node.name in decisions and {0, 1} <= set(read):
            found.weighted.add(node.name)
            continue
        found.edges.update(Edge(node.name or "", index) for index, pair in read.items() if not _is_weight(pair))
    return found


def _dequantizer(node: ir.Node, index: int) -> ir.Node | None:
    """Return the DequantizeLinear that an edge reads, directly or across operators that move values."""
    value = node.inputs[index]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "DequantizeLinear":
            return producer
        if not commutes(producer):
            break
        value = producer.inputs[0]
    return None


def _quantizer(dequantizer: ir.Node) -> ir.Node | None:
    codes = dequantizer.inputs[0]
    producer = codes.producer() if codes is not None else None
    return producer if producer is not None and producer.op_type == "QuantizeLinear" else None


def _is_weight(dequantizer: ir.Node) -> bool:
    """Tell whether a DequantizeLinear gives a constant: from codes, or from floats by a Q of their own."""
    source = _quantizer(dequantizer)
    return constant_array((source or dequantizer).inputs[0]) is not None


def _figures(case: Case) -> tuple[float, float]:
    """Return the least SQNR of an output of our model and of ModelOpt's, as exact fake quantization."""
    batches = held_back_batches(case.inputs)
    reference, ours, theirs = (_answers(path, batches) for path in (case.prepared, case.ours, case.theirs))
    floats = [name for name, values in reference.items() if values.dtype.kind == "f"] or list(reference)
    return (
        min(sqnr_db(reference[name], ours[name]) for name in floats),
        min(sqnr_db(reference[name], theirs[name]) for name in floats),
    )


def _answers(path: Path, batches: Iterable[Feeds]) -> dict[str, NDArray[Any]]:
    with OnnxRuntimeRunner(path, execution="exact", threads=2) as runner:
        answers = [runner.infer(feeds) for feeds in batches]
    return {name: np.concatenate([answer[name].ravel() for answer in answers]) for name in answers[0]}


def _tell(comparison: Comparison) -> None:
    """Print what differs, node by node."""
    print(comparison.name)
    for kind, nodes in sorted(comparison.kinds.items()):
        print(f"  {kind if kind in REASONS else f'UNEXPLAINED ({kind})'}: {', '.join(nodes)}")


INTRODUCTION = """# Placement beside ModelOpt's

Which nodes compute on INT8, and which edges read quantized values, in graphs that trt-int8 (`--target tensorrt`,
defaults) and ModelOpt {version} (INT8, defaults, its simplification off) made of the same prepared files.
An edge is counted where its value comes from a DequantizeLinear, directly or across operators that only move values.
SQNR in dB against FP32, the least of all outputs, both calibrated by the maximum on the same batches and run as exact
fake quantization by ONNX Runtime {runtime}. Weights are random, so it compares placements and says nothing about
trained models; where both quantize the same, a difference of a few dB, in either direction, is the luck of rounding
(a Softmax at the end makes much of it). No figure here comes from a GPU. Repeat it with

```bash
python benchmarks/modelopt_placement.py --output docs/placement-modelopt.md
```

"""

HEAD = (
    "model", "weighted: both", "only ours", "only ModelOpt", "other edges: both", "only ours", "only ModelOpt",
    "pairs ours", "pairs ModelOpt", "SQNR ours", "SQNR ModelOpt",
)  # fmt: skip


def _document(found: Sequence[Comparison], version: str) -> str:
    """Write the tables."""
    return INTRODUCTION.format(version=version, runtime=onnxruntime.__version__) + "\n".join(
        (
            f"| {' | '.join(HEAD)} |",
            f"|{'|'.join(['---', *['---:'] * (len(HEAD) - 1)])}|",
            *(_row(comparison) for comparison in found),
            "",
            "## What differs, and why",
            "",
            *_explanations(found),
            "",
        )
    )


def _row(comparison: Comparison) -> str:
    ours, theirs = comparison.ours, comparison.theirs
    other_ours, other_theirs = (
        {edge for edge in graph.edges if edge.node not in ours.weighted | theirs.weighted} for graph in (ours, theirs)
    )
    cells = [
        len(ours.weighted & theirs.weighted), len(ours.weighted - theirs.weighted),
        len(theirs.weighted - ours.weighted), len(other_ours & other_theirs), len(other_ours - other_theirs),
        len(other_theirs - other_ours), len(ours.tensors), len(theirs.tensors),
    ]  # fmt: skip
    figures = f"{comparison.ours_db:.1f} | {comparison.theirs_db:.1f}"
    return f"| {comparison.name} | {' | '.join(map(str, cells))} | {figures} |"


def _explanations(found: Sequence[Comparison]) -> Iterator[str]:
    counts = Counter(dict.fromkeys(REASONS, 0))
    models: dict[str, list[str]] = defaultdict(list)
    for comparison in found:
        for kind, nodes in comparison.kinds.items():
            counts[kind] += len(nodes)
            models[kind].append(comparison.name)
    yield "| kind | number | models | why ours stays float |"
    yield "|---|---:|---|---|"
    for kind, count in counts.most_common():
        if count:
            yield f"| {kind} | {count} | {', '.join(models[kind])} | {REASONS.get(kind, 'UNEXPLAINED')} |"
    yield ""
    total = sum(len(comparison.ours.weighted & comparison.theirs.weighted) for comparison in found)
    more = sum(len(comparison.theirs.weighted - comparison.ours.weighted) for comparison in found)
    alone = sum(len(nodes) for comparison in found for kind, nodes in comparison.kinds.items() if kind == "only ours")
    yield (
        f"Of {total + more} weighted operators that ModelOpt quantizes in {len(found)} models, {total} are quantized "
        f"here too; {alone} nodes or edges are quantized here alone."
    )


if __name__ == "__main__":
    sys.exit(main())
