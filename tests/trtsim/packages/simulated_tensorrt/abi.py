"""Python objects that C++ takes for TensorRT's: tables of virtual functions, made with ctypes. SIMULATED.

A public object is [table][address of its implementation object]..., an implementation object is [table]; the tables'
entries are functions that call the method of the same name. The order of the entries is a fact of TensorRT's binary
interface and stands in virtual_functions_10.txt and _11.txt, where a letter gives a type:

    v void, b bool, i int32 or enum, u uint32, q int64, Q uint64, f float, s const char*, p pointer or reference
    D Dims const& (argument), R Dims by value (result), T W structs by value, not simulated
    ~complete, ~deleting: the two destructors
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorrt_bindings

MAJOR = int(tensorrt_bindings.__version__.split(".")[0])
VERSION = tuple(int(part) for part in tensorrt_bindings.__version__.split("."))
SPARE_ENTRIES = 24
"""Behind each table: a function that this simulation has never heard of says so, and crashes nothing."""

_C_TYPES: dict[str, Any] = {
    "v": None, "b": ctypes.c_uint8, "i": ctypes.c_int32, "u": ctypes.c_uint32, "q": ctypes.c_int64,
    "Q": ctypes.c_uint64, "f": ctypes.c_float, "s": ctypes.c_char_p, "p": ctypes.c_void_p, "D": ctypes.c_void_p,
    "R": ctypes.c_void_p, "T": ctypes.c_uint64, "W": ctypes.c_void_p,
}  # fmt: skip
_RESULT_TYPES = _C_TYPES | {"s": ctypes.c_void_p}  # a result's text must outlive the call

# Functions of the public objects themselves, which call nothing behind.
_PUBLIC_FUNCTIONS = {"INetworkDefinition": ["getBuilder:p:"], "IBuilderConfig": ["setAvgTimingIterations:v:i"]}

_library = ctypes.CDLL(f"libnvinfer.so.{MAJOR}")
_library.trtsim_typeinfo.restype = ctypes.c_void_p
_typeinfo = _library.trtsim_typeinfo()
_nothing = ctypes.cast(_library.trtsim_nothing, ctypes.c_void_p).value

_objects: dict[int, Simulated] = {}  # address of a public or implementation object, to the object
_callbacks: list[Any] = []
_tables: list[Any] = []
_destructors: set[int | None] = set()
_texts: dict[str, Any] = {}


class Dims(ctypes.Structure):
    _fields_: ClassVar = [("count", ctypes.c_int32), ("values", ctypes.c_int64 * 8)]


def read_dims(address: int) -> tuple[int, ...]:
    dims = Dims.from_address(address)
    return tuple(dims.values[: max(dims.count, 0)])


def write_dims(address: int, shape: Sequence[int] | None) -> None:
    """Write a shape; None is TensorRT's answer to a question that has none."""
    dims = Dims.from_address(address)
    dims.count = -1 if shape is None else len(shape)
    for axis, size in enumerate(shape or ()):
        dims.values[axis] = size


def text_address(text: str | None) -> int:
    """Address of a C string that stays for the life of the process."""
    if text is None:
        return 0
    if text not in _texts:
        _texts[text] = ctypes.create_string_buffer(text.encode())
    return ctypes.addressof(_texts[text])


def call_user(address: int, entry: int, result: Any, *arguments: Any) -> Any:
    """Call a virtual function of an object of the user's, such as a calibrator, by its place in the table."""
    table = ctypes.c_void_p.from_address(address).value or 0
    function = ctypes.c_void_p.from_address(table + 8 * entry).value or 0
    return ctypes.CFUNCTYPE(result, ctypes.c_void_p, *(type(argument) for argument in arguments))(function)(
        address, *arguments
    )


def simulated(address: int) -> Any:
    """The object behind a pointer that the bindings hand in."""
    return _objects[address]


class Logger:
    """The user's ILogger."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, address: int) -> None:
        self.address = address

    def log(self, severity: int, text: str) -> None:
        line = f"{text} [SIMULATED]".encode()
        call_user(self.address, 0 if MAJOR == 10 else 4, None, ctypes.c_int32(severity), ctypes.c_char_p(line))


class Simulated:
    """An object of TensorRT: the public part and the implementation part in one piece of memory."""

    interface: ClassVar[str]
    public: ClassVar = True  # False: the bindings hold the implementation object itself

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        unknown = _table("unknown class", type(self), ())
        self._memory = (ctypes.c_void_p * 5)()
        start = ctypes.addressof(self._memory)
        self._addresses = [start, start + 24] if self.public else [start + 24]
        self._memory[0] = _table(self.interface, type(self), ["~complete", "~deleting", *self._public_functions()])
        self._memory[1] = start + 24
        self._memory[2] = start + 32  # what the class of a special layer adds
        self._memory[3] = _table(self.interface, type(self), _FUNCTIONS[self.interface])
        self._memory[4] = unknown
        self.address = self._addresses[0]
        _objects.update(dict.fromkeys(self._addresses, self))

    def _public_functions(self) -> list[str]:
        return _PUBLIC_FUNCTIONS.get(self.interface, [])

    def destroy(self) -> None:
        """Called when the bindings delete the object."""
        for address in self._addresses:
            _objects.pop(address, None)

    def error(self, text: str) -> None:
        self.logger.log(Logger.ERROR, f"{self.interface}: {text}")

    def getPImpl(self) -> Simulated:
        return self

    def getLogger(self) -> int:
        return self.logger.address

    def setErrorRecorder(self, recorder: int) -> None:
        pass

    def getErrorRecorder(self) -> int:
        return 0


def _read_functions() -> dict[str, list[str]]:
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (Path(__file__).with_name(f"virtual_functions_{MAJOR}.txt")).read_text().splitlines():
        if line.startswith("  "):
            current += line.split()
        elif line and not line.startswith("#"):
            current = functions[line] = []
    return functions


_FUNCTIONS = _read_functions()
_made: dict[tuple[str, type, int], int] = {}


def _table(interface: str, cls: type, functions: Sequence[str]) -> int:
    """Address of the first entry of a table whose functions call the methods of `cls`."""
    key = (interface, cls, len(functions))
    if key not in _made:
        seen: Counter[str] = Counter()
        entries = [_entry(interface, text, seen) for text in functions]
        entries += [_entry(interface, f"number {len(functions) + i}:Q:", seen) for i in range(SPARE_ENTRIES)]
        table = (ctypes.c_void_p * (len(entries) + 2))(0, _typeinfo, *entries)
        _tables.append(table)
        _made[key] = ctypes.addressof(table) + 16
    return _made[key]


def _entry(interface: str, text: str, seen: Counter[str]) -> int | None:
    if text.startswith("~"):
        entry = _keep(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_destroy))
        _destructors.add(entry)
        return entry
    name, result, arguments = text.split(":")
    seen[name] += 1
    if seen[name] > 1:  # an overload
        name = f"{name}_{seen[name]}"
    types = [ctypes.c_void_p, *(_C_TYPES[letter] for letter in arguments)]
    if result == "R":  # the caller's memory for the result comes first
        types.insert(0, ctypes.c_void_p)
    return _keep(ctypes.CFUNCTYPE(_RESULT_TYPES[result], *types)(_caller(interface, name, result, arguments)))


def _caller(interface: str, name: str, result: str, arguments: str) -> Callable[..., Any]:
    def call(*raw: Any) -> Any:
        place, (this, *values) = (raw[0], raw[1:]) if result == "R" else (0, raw)
        answer = None
        try:
            method = getattr(_objects[this], name, None)
            if method is None:
                print(f"SIMULATED TensorRT: {interface}.{name} is not simulated", file=sys.stderr)
            else:
                answer = method(*itertools.starmap(_argument, zip(arguments, values, strict=True)))
        except Exception:  # it cannot travel through C++
            print(f"SIMULATED TensorRT: error in {interface}.{name}", file=sys.stderr)
            traceback.print_exc()
        if result == "R":
            write_dims(place, answer)
            return place
        if result == "v":
            return None
        if result == "s":
            return text_address(answer)
        if result == "f":
            return float(answer or 0)
        return answer.address if isinstance(answer, Simulated) else int(answer or 0)

    return call


def _argument(letter: str, value: Any) -> Any:
    if letter == "s":
        return None if value is None else value.decode()
    if letter == "D":
        return read_dims(value)
    return bool(value) if letter == "b" else (value or 0)


def _destroy(this: int) -> None:
    if this in _objects:
        _objects[this].destroy()


def _keep(callback: Any) -> int | None:
    _callbacks.append(callback)
    return ctypes.cast(callback, ctypes.c_void_p).value


@atexit.register
def _forget_destructors() -> None:
    """The bindings delete what is left while the interpreter ends, when no Python function can run any more."""
    for table in _tables:
        for index, entry in enumerate(table):
            if entry in _destructors:
                table[index] = _nothing
    for kept in (_callbacks, _tables, _texts, _objects):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
