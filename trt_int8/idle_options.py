"""Options that change nothing: a result that looks like another one than it is misleads whoever asked for it.

What the other options decide is refused before anything is done. What the model alone decides, such as a residual Add
that it has not, is told in a note: the same options often serve several models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from calibrators.calibration import DEFAULT_PERCENTILE
from engines.placement import ActivationPoint, Placement
from engines.placement_options import PlacementOptions
from trt_int8.errors import UsageError


def refuse_idle(options: Mapping[str, bool], why: str, advice: str) -> None:
    """Refuse options that would change nothing.

    Args:
        options: option, as the command line has it, to whether it was given: to whether it differs from its default.
        why: why they would change nothing.
        advice: what to do in place of leaving them out.

    Raises:
        UsageError: one of them was given.
    """
    given = [name for name, is_given in options.items() if is_given]
    if given:
        it = "them" if len(given) > 1 else "it"
        raise UsageError(f"{' and '.join(given)} would change nothing: {why}. Leave {it} out, or {advice}.")


def refuse_unread_preprocessing(preprocessing: object, *data: object) -> None:
    """Refuse a preprocessing where there are no data for it.

    Raises:
        UsageError: it was given, and all of `data` are None.
    """
    unread = preprocessing is not None and all(source is None for source in data)
    refuse_idle({"--preprocessing": unread}, "there are no data that it could prepare", "add --data")


def refuse_idle_percentile(percentile: float, method: str) -> None:
    """Refuse a percentile beside a method that takes none.

    Raises:
        UsageError: the percentile is not the default, and the method is not "percentile".
    """
    idle = percentile != DEFAULT_PERCENTILE and method != "percentile"
    refuse_idle({"--percentile": idle}, f"the method is {method}", "add --method percentile")


def idle_wishes(
    options: PlacementOptions, placement: Placement, place: Callable[[PlacementOptions], Placement]
) -> tuple[str, ...]:
    """Say which wishes about placement change nothing in a model, one line each.

    Args:
        options: the wishes.
        placement: the placement by them.
        place: makes the placement of the same model by other wishes.
    """
    notes: list[str] = []
    if options.residual == "float" and _effect(place(replace(options, residual="int8"))) == _effect(placement):
        notes.append("residual float changed nothing: the model has no Add whose skip input would be in INT8")
    if options.attention == "int8" and _effect(place(replace(options, attention="float"))) == _effect(placement):
        notes.append(
            "attention int8 changed nothing: the model has no product of attention that the rules allow in INT8"
        )
    if options.exclude:
        otherwise = _quantized(place(replace(options, exclude=())))
        notes += [
            f"exclude {expression!r} changed nothing: what it matches stays float without it"
            for expression in options.exclude
            if not _matches(expression, otherwise)
        ]
    if options.include:
        gained = _quantized(placement) - _quantized(place(replace(options, include=())))
        notes += [
            f"include {expression!r} changed nothing: what it matches is in INT8 without it, or stays float with it"
            for expression in options.include
            if not _matches(expression, gained)
        ]
    return tuple(notes)


def _matches(expression: str, nodes: Iterable[str]) -> bool:
    return any(re.fullmatch(expression, node) for node in nodes)


def _quantized(placement: Placement) -> set[str]:
    return {decision.node for decision in placement.decisions if decision.quantized}


def _effect(placement: Placement) -> tuple[list[ActivationPoint], set[str]]:
    """Return what a placement does, without its reasons."""
    return [replace(point, rule="", reason="") for point in placement.activations], _quantized(placement)
