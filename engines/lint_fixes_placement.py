"""Fixes of places: pairs that are taken away or moved, and scales that are made one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from engines.lint_editor import Editor, Outcome
from engines.lint_graph import Quantizer
from engines.lint_rules_placement import concat_groups, lonely_pairs, split_pads, split_pairs
from engines.lint_rules_residual import residual_adds
from engines.lint_rules_values import same_scale
from engines.placement import WEIGHTED, sole_consumer


def take_lonely_pairs(editor: Editor) -> Iterator[Outcome]:
    """Take pairs away that nothing computing on INT8 reads; values inside the range move by at most scale / 2."""
    for first, last in list(lonely_pairs(editor.graph)):
        yield _skip(editor, "lonely-pair", first, last)


def take_split_pairs(editor: Editor) -> Iterator[Outcome]:
    """Take pairs away that stand between an operator and its activation."""
    for first, last, _ in list(split_pairs(editor.graph)):
        yield _skip(editor, "split-activation", first, last)


def take_branch_pairs(editor: Editor) -> Iterator[Outcome]:
    """Let residual Adds read their convolution itself."""
    if not any(_reads_branch(editor, node) for node in editor.graph.nodes):
        return
    for found in residual_adds(editor.graph):
        if found.branch is None:
            continue
        name = str(found.node.name)
        first = editor.graph.source(found.branch)
        if first is None or not editor.same_type(first.data, found.branch.output):
            yield Outcome("residual-branch", name, False, "its values before and after the pair have different types")
            continue
        value = found.branch.output
        for index, read in enumerate(found.node.inputs):
            if read is value:
                found.node.replace_input_with(index, first.data)
        editor.drop(value)
        yield Outcome("residual-branch", name, True, "it reads its convolution directly")


def take_requantization(editor: Editor) -> Iterator[Outcome]:
    """Of two pairs one behind the other take the first one away, where nothing else reads it."""
    graph = editor.graph
    gone: set[ir.Node] = set()
    for first, last in list(graph.activation_pairs):
        readers, _ = graph.readers(last.output)
        again = [graph.by_output[node.outputs[0]] for node, _ in readers if node.outputs[0] in graph.by_output]
        direct = [second for second in again if second.data is last.output]
        if not direct and all(same_scale(first, second) for second in again):
            continue
        if first.node in gone:
            continue
        name = str((direct or again)[0].node.name)
        alone = sole_consumer(last.output) is not None and sole_consumer(first.output) is last.node
        if not (alone and direct) or any(second.node in gone for second in direct):
            yield Outcome("requantized", name, False, "other nodes read the first pair too, or stand between the two")
            continue
        gone.update((first.node, direct[0].node))
        why = editor.skip_pair(first, last)
        yield Outcome("requantized", name, why is None, why or "the pair before it is gone")


def move_before_pad(editor: Editor) -> Iterator[Outcome]:
    """Move pairs from behind a Pad to before it. Exact: zeros and repeated values are codes of every scale."""
    for pad, first, last in list(split_pads(editor.graph)):
        source, padded, graph = pad.inputs[0], pad.outputs[0], pad.graph
        if source is None or graph is None or not editor.same_type(source, last.output):
            yield Outcome("split-pad", str(first.node.name), False, "the types around the Pad differ")
            continue
        for use in list(last.output.uses()):
            use.node.replace_input_with(use.idx, padded)
        first.node.replace_input_with(0, source)
        pad.replace_input_with(0, last.output)
        graph.remove(pad)
        graph.insert_after(last.node, pad)
        first.output.shape = last.output.shape = source.shape
        yield Outcome("split-pad", str(first.node.name), True, f"it stands before {pad.name}")


def unify_concats(editor: Editor) -> Iterator[Outcome]:
    """Give the inputs and the output of a Concat the largest of their scales; Concats that share a pair share one.

    A pair of the same scale on the other side of operators that only move values, such as a MaxPool between two pairs,
    changes with it.
    """
    graph = editor.graph
    parents: dict[Quantizer, Quantizer] = {}

    def root(record: Quantizer) -> Quantizer:
        while parents.setdefault(record, record) is not record:
            parents[record] = record = parents[parents[record]]
        return record

    concats: list[tuple[ir.Node, Quantizer]] = []
    for group in concat_groups(graph):
        sources = [graph.source(record) if record is not None else None for record in group.inputs]
        members = [*(source for source in sources if source is not None), *group.outputs]
        unequal = any(not same_scale(members[0], member) for member in members[1:]) if members else False
        if None in group.inputs:
            continue
        if None in sources:
            if unequal:
                yield Outcome(
                    "concat-scales", str(group.node.name), False, "a constant among its inputs has a scale too"
                )
        elif any(member.scale is None or member.per_channel for member in members):
            yield Outcome("concat-scales", str(group.node.name), False, "not all of the scales are single and known")
        else:
            for member in members[1:]:
                parents[root(member)] = root(members[0])
            if unequal:
                concats.append((group.node, members[0]))
    for first, last in graph.activation_pairs if concats else ():
        if first.scale is None or first.per_channel:
            continue
        for node, _ in graph.readers(last.output)[0]:
            second = graph.by_output.get(node.outputs[0])
            if second is not None and second.scale is not None and same_scale(first, second):
                parents[root(second)] = root(first)
    components: dict[Quantizer, list[Quantizer]] = {}
    for record in list(parents):
        components.setdefault(root(record), []).append(record)
    largest = {
        key: max(float(np.asarray(member.scale)[0]) for member in members) for key, members in components.items()
    }
    for key in dict.fromkeys(root(member) for _, member in concats):
        for member in components[key]:
            for record in (member, *graph.dequantizers(member)):
                if record.scale_type is not None:
                    editor.set_scale(record, np.asarray(largest[key], record.scale_type.numpy()))
    for node, member in concats:
        yield Outcome("concat-scales", str(node.name), True, f"all of its scales are {largest[root(member)]:.4g}")


def _reads_branch(editor: Editor, node: ir.Node) -> bool:
    """Tell whether an Add reads a convolution through a pair."""
    records = [editor.graph.by_output.get(value) for value in node.inputs if value is not None]
    producers = [item.data.producer() for record in records if record and (item := editor.graph.source(record))]
    return node.op_type == "Add" and any(producer and producer.op_type in WEIGHTED for producer in producers)


def _skip(editor: Editor, rule: str, first: Quantizer, last: Quantizer) -> Outcome:
    why = editor.skip_pair(first, last)
    return Outcome(rule, str(first.node.name), why is None, why or "the pair is gone")
