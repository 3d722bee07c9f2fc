"""Compiled loops: numba as this package uses it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj
from numpy.typing import NDArray

_array_class: Any = arrayobj.make_array

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def njit(function: Function) -> Function:
    """Compile `function` on its first call: without the GIL, IEEE division as in numpy, machine code kept on disk.

    numba keeps the code beside the module, or in the user's cache folder where the package is installed read-only.
    Where it can write to neither (a container with a read-only file system and no home), it refuses to cache at all;
    the function is then compiled anew in each process, which costs a second or two and changes no result.
    """
    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError as error:
        logger.debug("%s will be compiled anew in each process: %s", function.__qualname__, error)
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _array_class(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        kind = cgutils.int32_t
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [address.type], ir.FunctionType(ir.VoidType(), [address.type, kind, kind, kind])
        )
        builder.call(function, [address, kind(0), kind(3), kind(1)])  # for reading, to be kept in all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


prefetch = cast(Callable[[NDArray[Any], int], None], intrinsic(_prefetch))
"""Have the processor fetch the cache line of `array[index]`, without waiting for it; in compiled loops only.

It pays where a loop reads memory in bursts: the processor's own prefetching stops at the end of a page. The array is
1-D and contiguous; the index may lie beyond it, which does nothing.
"""
