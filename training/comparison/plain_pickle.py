"""load_plain: pickles of other projects, read without running what they say.

A pickle is a program: reading one from the net with `pickle.load` runs it. Here it can name nothing
but the makers of numpy arrays and plain containers, and gets stand-ins even for these. Invariants:
what comes back is dict, list, tuple, str, bytes, bool, number, None or an array of numbers or
strings; nothing that a file says is imported, called or set as an attribute.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

_KINDS = "biufSU"
"""Of numpy's dtypes: numbers and strings; never objects, which would be pickles again."""
_DEPTH = 20


class NotPlain(Exception):
    """The file asks for something that is no plain data."""


class _Dtype:
    """Stands in for numpy.dtype: a name and a byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: Any, *_: Any) -> None:
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, size, alignment, flags)
        if not isinstance(state, tuple) or any(part is not None for part in state[2:5]):
            raise NotPlain(f"dtype {self.name} with the state {state!r:.80}")
        self.order = ">" if state[1] == ">" else "<"

    def real(self) -> "np.dtype[Any]":
        try:
            found = np.dtype(self.name)
        except (TypeError, ValueError) as error:
            raise NotPlain(f"dtype {self.name!r:.80}") from error
        if found.kind not in _KINDS or found.itemsize == 0:
            raise NotPlain(f"an array of {found}")
        return found.newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands in for an array until its bytes have come."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        # (version, shape, dtype, Fortran order, bytes)
        if not isinstance(state, tuple) or len(state) != 5:
            raise NotPlain(f"an array with the state {state!r:.80}")
        _, shape, dtype, fortran, content = state
        self.value = _filled(content, dtype, shape, "F" if fortran else "C")


def _filled(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    """An array of these bytes. Its memory is no more than the file's own."""
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
        raise NotPlain(f"an array of {type(content).__name__} by {type(dtype).__name__}")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise NotPlain(f"an array of shape {shape!r:.80}")
    real = dtype.real()
    if math.prod(shape) * real.itemsize != len(content):
        raise NotPlain(f"an array of shape {shape} and {real} in {len(content)} bytes")
    return np.frombuffer(content, real).reshape(shape, order="F" if order == "F" else "C").copy()


class _Maker:
    """One of the callables a file may name. An object without attributes: a pickle can set those
    of whatever it is handed, and a function's are its code."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __setattr__(self, name: str, value: Any) -> None:
        raise NotPlain(f"an attribute {name} set on what makes data")

    def __setstate__(self, state: Any) -> None:
        raise NotPlain("a state set on what makes data")

    def __call__(self, *given: Any) -> Any:
        return self._make(*given)


def _scalar(dtype: Any, content: Any) -> Any:
    return _filled(content, dtype, ())[()]


def _dictionary(*given: Any) -> dict[Any, Any]:
    """An empty dict: of defaultdict, whose argument is the maker of what is not there."""
    if any(not isinstance(each, _Maker | type(None)) for each in given):
        raise NotPlain("a dict of something")
    return {}


_MAKERS: dict[str, Callable[..., Any]] = {
    "reconstruct": lambda *_: _Array(),
    "scalar": _scalar,
    "frombuffer": _filled,
    "dtype": _Dtype,
    "dict": _dictionary,
    "list": list,
    "array type": lambda *_: _refuse("an array made otherwise"),
    "no bytes": lambda: b"",
    "bytes": lambda text="", how="latin1": str(text).encode("latin1"),
}
_ALLOWED = {
    ("numpy", "ndarray"): "array type",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy.core.numeric", "_frombuffer"): "frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "frombuffer",
    ("collections", "defaultdict"): "dict",
    ("collections", "OrderedDict"): "dict",
    ("builtins", "dict"): "dict",
    ("__builtin__", "dict"): "dict",
    ("builtins", "list"): "list",
    ("_codecs", "encode"): "bytes",
    ("builtins", "bytes"): "no bytes",
    ("__builtin__", "bytes"): "no bytes",
}
"""Module and name in a file, and what stands in for it."""


def _refuse(what: str) -> Any:
    raise NotPlain(what)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        maker = _ALLOWED.get((module, name))
        if maker is None:
            raise NotPlain(f"{module}.{name}")
        return _Maker(_MAKERS[maker])

    def persistent_load(self, pid: Any) -> Any:
        raise NotPlain(f"something outside of the file ({pid!r:.40})")


def load_plain(content: bytes) -> Any:
    """The data in a pickle. Raises: NotPlain, naming what the file asks for beside plain data."""
    try:
        return _Walk()(_Reader(io.BytesIO(content)).load())
    except NotPlain:
        raise
    # A file may be broken in any way a program can be.
    except Exception as error:
        raise NotPlain(f"no pickle that can be read ({type(error).__name__}: {error})") from error


class _Walk:
    """Puts arrays in the place of their stand-ins, and refuses what is still no plain data.

    Each container is looked at once: a file of a hundred bytes can nest itself into billions.
    """

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, _Array):
            return value.value if value.value is not None else _refuse("an array without content")
        if isinstance(value, str | bytes | bool | int | float | np.ndarray | np.generic | None):
            return value
        if not isinstance(value, dict | list | tuple):
            raise NotPlain(f"a {type(value).__name__}")
        if depth > _DEPTH:
            raise NotPlain(f"containers nested more than {_DEPTH} deep")
        if id(value) not in self.done:
            self.done[id(value)] = value
            self.done[id(value)] = self._container(value, depth + 1)
        return self.done[id(value)]

    def _container(self, value: Any, depth: int) -> Any:
        """In place where it can be."""
        if isinstance(value, tuple):
            return tuple(self(each, depth) for each in value)
        if isinstance(value, list):
            # 14 million scores are not looked at one by one.
            if not all(type(each) is float for each in value):
                value[:] = [self(each, depth) for each in value]
            return value
        if not all(isinstance(key, str | int) for key in value):
            raise NotPlain("a dict whose keys are no names")
        for key in value:
            value[key] = self(value[key], depth)
        return value
