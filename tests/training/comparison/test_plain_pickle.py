"""Pickles are read as data: whatever else they say is refused before it happens."""

import collections
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.comparison.plain_pickle import NotPlain, load_plain

_PLAIN = {
    "clip": {"logits": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "v": [0.5, 1.0]}},
    "scalar": np.float64(2.5),
    "names": np.array(["a", "bc"]),
    "transposed": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "swapped": np.arange(3, dtype=">i4"),
    "rest": [None, True, -3, 1e300, "x", b"y", (1, ("z",))],
    "empty": np.zeros((0, 3)),
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_come_back_as_they_were(protocol: int) -> None:
    found = load_plain(pickle.dumps(_PLAIN, protocol=protocol))
    np.testing.assert_equal(found, _PLAIN)
    assert found["swapped"].dtype.kind == "i"


def test_a_defaultdict_comes_back_as_a_dict() -> None:
    given = collections.defaultdict(dict, {"clip": {"predictions": {"a": ["dog"]}}})
    found = load_plain(pickle.dumps(given))
    assert type(found) is dict
    assert found == given


class _Runs:
    def __init__(self, call: Any, *args: Any) -> None:
        self.how = (call, args)

    def __reduce__(self) -> Any:
        return self.how


def test_nothing_that_a_file_says_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    said = pickle.dumps({"clip": _Runs(os.mkdir, str(target))})
    with pytest.raises(NotPlain, match=r"posix\.mkdir"):
        load_plain(said)
    assert not target.exists()
    pickle.loads(said)
    assert target.exists(), "the file does what it says when it is trusted"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_Runs(eval, "1"), "builtins.eval"),
        (_Runs(getattr, {}, "x"), "builtins.getattr"),
        (_Runs(np.load, "x"), "numpy"),
        (np.array([{"a": 1}], dtype=object), "an array of"),
        ({1, 2}, "a set"),
        ({(1, 2): 3}, "keys are no names"),
        (np.dtype("f4"), "_Dtype"),
    ],
)
def test_what_is_no_plain_data_is_refused_by_name(content: Any, said: str) -> None:
    with pytest.raises(NotPlain, match=said):
        load_plain(pickle.dumps(content))


def _program(*lines: bytes) -> bytes:
    return b"\x80\x04" + b"".join(lines) + b"."


_MAKER = b"cnumpy\ndtype\n"


@pytest.mark.parametrize(
    "program",
    [
        _program(_MAKER, b"}X\x05\x00\x00\x00_makeX\x01\x00\x00\x00xsb"),
        _program(_MAKER, b"N}X\x08\x00\x00\x00__code__K\x01s\x86b"),
        _program(b"cbuiltins\n__import__\n(X\x02\x00\x00\x00ostR"),
        _program(b"ccollections\ndefaultdict\n(cbuiltins\neval\ntR"),
        _program(b"X\x01\x00\x00\x00xQ"),
        b"\x80\x04cposix\nsystem\n(X\x02\x00\x00\x00idtR.",
        b"not a pickle",
        b"",
    ],
    ids=["state", "attribute", "import", "factory", "persistent", "system", "text", "empty"],
)
def test_programs_written_by_hand_are_refused(program: bytes) -> None:
    with pytest.raises(NotPlain):
        load_plain(program)


def test_an_array_larger_than_its_bytes_is_refused() -> None:
    said = pickle.dumps(np.zeros(1000), protocol=2)
    shape = next(
        position for op, arg, position in pickletools.genops(said) if arg == 1000 and position
    )
    huge = said[:shape] + b"J\xff\xff\xff\x7f" + said[shape + 3 :]
    with pytest.raises(NotPlain, match="in 8000 bytes"):
        load_plain(huge)


def test_a_small_file_that_nests_itself_into_billions_is_looked_at_once() -> None:
    nested: list[Any] = ["x"]
    for _ in range(15):
        nested = [nested] * 10
    found = load_plain(pickle.dumps(nested))
    for _ in range(15):  # Comparing the two would look at all of them.
        assert len(found) == 10
        found = found[-1]
    assert found == ["x"]
