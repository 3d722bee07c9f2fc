"""Options that change nothing: a result that looks like another one than it is misleads whoever asked for it.

What the other options decide is refused before anything is done. What the model alone decides, such as a residual Add
that it has not, is told in a note: the same options often serve several models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from calibrators.calibration import DEFAULT_PERCENTILE
from engines.placement import ActivationPoint, Placement, WeightPoint
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
    wishes: list[tuple[str, PlacementOptions, str]] = []
    if options.residual == "float":
        why = "the model has no Add whose skip input would be in INT8"
        wishes.append(("residual float", replace(options, residual="int8"), why))
    if options.attention == "int8":
        why = "the model has no product of attention that the rules allow in INT8"
        wishes.append(("attention int8", replace(options, attention="float"), why))
    for expression in options.exclude:
        others = [other for other in options.exclude if other != expression]
        why = "what it matches stays float without it"
        wishes.append((f"exclude {expression!r}", replace(options, exclude=others), why))
    for expression in options.include:
        others = [other for other in options.include if other != expression]
        why = "what it matches is in INT8 without it, or cannot be"
        wishes.append((f"include {expression!r}", replace(options, include=others), why))
    effect = _effect(placement)
    return tuple(f"{wish} changed nothing: {why}" for wish, other, why in wishes if _effect(place(other)) == effect)


def _effect(placement: Placement) -> tuple[list[ActivationPoint], list[WeightPoint], set[str]]:
    """Return what a placement does, without its reasons."""
    points = [replace(point, rule="", reason="") for point in placement.activations]
    quantized = {decision.node for decision in placement.decisions if decision.quantized}
    return points, list(placement.weights), quantized
