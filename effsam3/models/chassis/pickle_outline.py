# SPDX-License-Identifier: Apache-2.0
"""What a pickle of torch.save would make, worked out without making it: no name in it is imported, nothing is called.

torch.load trusts the numbers in a file: a storage that is longer than its record, or a tensor that reaches beyond its
storage, is read from whatever lies behind. So they are compared here first.
"""

from __future__ import annotations

import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

STORAGES = {
    "FloatStorage": 4,
    "DoubleStorage": 8,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "UntypedStorage": 1,
}
# What makes a tensor that is no plain one -> what that is.
REFUSED = {
    "torch._utils._rebuild_qtensor": "a quantised tensor; save the weights before quantisation",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor; save it as .to_dense()",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor; save it as .to_dense()",
    "torch._utils._rebuild_nested_tensor": "a nested tensor; save its parts",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of device meta, which has a shape but no numbers; save "
    "the model once its weights are loaded",
}
# Names of plain values, which torch.load makes of what stands in the file alone.
PLAIN = {
    "collections.OrderedDict",
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "_codecs.encode",
    "builtins.set",
    "builtins.complex",
}
# What wrong bytes make of a pickle when it is taken apart.
BROKEN = (ValueError, LookupError, EOFError, TypeError, OverflowError, RecursionError, struct.error)


class OutlineError(ValueError):
    """A pickle that torch.save has not written, in words that follow the name of its file."""


@dataclass(frozen=True)
class Name:
    """Something that the pickle refers to by module and name."""

    name: str


@dataclass(frozen=True)
class Made:
    """What calling a name would give: a tensor, a size, an object."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Storage:
    """The numbers of one record of the file."""

    key: str
    itemsize: int
    nbytes: int


MARK = object()


class Outline:
    """One pickle, taken apart.

    Attributes:
        content: dicts, lists, tuples, plain values, and `Name`, `Made`, `Storage` for the rest.
        names: everything that the pickle refers to by name.
        storages: {key: bytes} of the records that it needs.
        itemsizes: {key: bytes of one element} of the same.
    """

    def __init__(self, stream: BinaryIO):
        """Read one pickle from a stream, up to its end.

        Raises:
            OutlineError: it is damaged, or a tensor in it cannot be.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.storages: dict[str, int] = {}
        self.itemsizes: dict[str, int] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    break
                if opcode.name in PUSHED:
                    self.stack.append(PUSHED[opcode.name]() if argument is None else argument)
                elif opcode.name in STEPS:
                    STEPS[opcode.name](self, argument)
                else:
                    raise OutlineError(f"has the pickle instruction {opcode.name}, which torch.save does not write")
            (self.content,) = self.stack
        except OutlineError:
            raise
        except BROKEN as error:
            raise OutlineError(f"is damaged: its pickle cannot be taken apart ({error})") from error

    def pop_to_mark(self) -> list[Any]:
        """Take what lies above the last mark off the stack."""
        start = len(self.stack) - 1
        while self.stack[start] is not MARK:  # an IndexError at the bottom
            start -= 1
            if start < 0:
                raise OutlineError("is damaged: its pickle has lost a mark")
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def name(self, argument: str) -> None:
        """Push a reference to something by name."""
        module, name = argument.split(" ")
        if (module, name) in NAME_MAPPING:  # names of Python 2, which the protocol of torch.save writes
            module, name = NAME_MAPPING[module, name]
        full = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        self.names.add(full)
        self.stack.append(Name(full))

    def storage(self, _) -> None:
        """Push the record that a tuple describes: storage, type, key, device, number of elements."""
        described = self.stack.pop()
        if not isinstance(described, tuple) or len(described) not in (5, 6) or described[0] != "storage":
            raise OutlineError("is damaged: it refers to a record in another way than torch.save does")
        _, kind, key, device, elements = described[:5]
        size = STORAGES.get(kind.name.rpartition(".")[2]) if isinstance(kind, Name) else None
        if size is None and isinstance(kind, Name) and kind.name.startswith("torch.Q"):
            raise OutlineError("holds a quantised tensor; save the weights before quantisation")
        if size is None or not isinstance(key, str) or not isinstance(device, str) or not _counts([elements]):
            raise OutlineError(f"is damaged: a record of it is described as {described[1:5]!r}")
        found = Storage(key, size, size * elements)
        self.itemsizes[key] = size
        if self.storages.setdefault(key, found.nbytes) != found.nbytes:
            raise OutlineError(f"is damaged: its record {key} is said to have two sizes")
        if described[5:] not in ((), (None,)):
            raise OutlineError("keeps a part of a storage in the way of torch before 0.4; save it again")
        self.stack.append(found)

    def call(self, _) -> None:
        """Push what calling a name would give."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise OutlineError("is damaged: its pickle calls something that has no name")
        if function.name in REFUSED:
            raise OutlineError(f"holds {REFUSED[function.name]}")
        if function.name.startswith("torch._utils._rebuild_tensor_v"):
            refuse_beyond(function.name, arguments)
        if function.name == "_codecs.encode" and arguments[1:] not in (("latin1",), ("latin-1",)):
            raise OutlineError("is damaged: it holds bytes in another way than torch.save does")
        if function.name == "collections.OrderedDict" and not arguments:
            self.stack.append({})  # filled by what follows
        else:
            self.stack.append(Made(function.name, arguments))

    def state(self, _) -> None:
        """Leave out the attributes of an object (of a state_dict, its `_metadata`)."""
        self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (dict, Made)) or (isinstance(target, Made) and target.name in PLAIN):
            raise OutlineError("is damaged: its pickle changes a plain value")  # a tensor could be given another shape

    def items(self, pairs: list[Any]) -> None:
        """Fill the mapping on top of the stack."""
        target = self.stack[-1]
        if len(pairs) % 2 or not isinstance(target, (dict, Made)):
            raise OutlineError("is damaged: its pickle fills something that is no mapping")
        if isinstance(target, dict):
            target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def entries(self, values: list[Any]) -> None:
        """Lengthen the list on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, (list, Made)):
            raise OutlineError("is damaged: its pickle lengthens something that is no list")
        if isinstance(target, list):
            target.extend(values)

    def wrap(self, count: int | None) -> None:
        """Make a tuple of the last values, all above the mark if no number is given."""
        if count is None:
            self.stack.append(tuple(self.pop_to_mark()))
        else:
            if len(self.stack) < count:
                raise OutlineError("is damaged: its pickle has lost a value")
            self.stack[-count:] = [tuple(self.stack[-count:])]


def _pair(outline: Outline, _) -> None:
    value, key = outline.stack.pop(), outline.stack.pop()
    outline.items([key, value])


def _entry(outline: Outline, _) -> None:
    value = outline.stack.pop()
    outline.entries([value])


def _keep(outline: Outline, place: int) -> None:
    outline.memo[place] = outline.stack[-1]


# instruction -> what it pushes; None: its argument
PUSHED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "MARK": lambda: MARK,
} | dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), str)
STEPS: dict[str, Callable[[Outline, Any], None]] = {
    "PROTO": lambda outline, _: None,
    "GLOBAL": Outline.name,
    "BINPERSID": Outline.storage,
    "REDUCE": Outline.call,
    "NEWOBJ": Outline.call,
    "BUILD": Outline.state,
    "SETITEM": _pair,
    "SETITEMS": lambda outline, _: outline.items(outline.pop_to_mark()),
    "APPEND": _entry,
    "APPENDS": lambda outline, _: outline.entries(outline.pop_to_mark()),
    "TUPLE": lambda outline, _: outline.wrap(None),
    "TUPLE1": lambda outline, _: outline.wrap(1),
    "TUPLE2": lambda outline, _: outline.wrap(2),
    "TUPLE3": lambda outline, _: outline.wrap(3),
    "BINPUT": _keep,
    "LONG_BINPUT": _keep,
    "BINGET": lambda outline, place: outline.stack.append(outline.memo[place]),
    "LONG_BINGET": lambda outline, place: outline.stack.append(outline.memo[place]),
}


def _counts(values: Any) -> bool:
    """Whether these are whole numbers from 0 on."""
    return all(type(value) is int and value >= 0 for value in values)


def refuse_beyond(function: str, arguments: tuple) -> None:
    """Refuse a tensor that reaches beyond its storage.

    Raises:
        OutlineError: it does, or is described in another way than torch.save does.
    """
    storage, offset, size, stride = arguments[:4] if len(arguments) >= 6 else (None,) * 4
    if isinstance(size, Made) and size.name == "torch.Size" and size.arguments:
        size = size.arguments[0]
    kind, metadata = (arguments[6:7], arguments[7:]) if function.endswith("v3") else ((), arguments[6:])
    dtype = getattr(torch, kind[0].name.rpartition(".")[2], None) if kind and isinstance(kind[0], Name) else None
    if (
        not isinstance(storage, Storage)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or len(size) != len(stride)
        or not _counts([offset, *size, *stride])
        or type(arguments[4]) is not bool
        or not isinstance(arguments[5], dict)
        or (function.endswith("v3") and not isinstance(dtype, torch.dtype))
        or not all(isinstance(one, dict) and one.keys() <= {"conj", "neg"} for one in metadata)
    ):
        raise OutlineError("is damaged: a tensor in it is described in another way than torch.save does")
    itemsize = storage.itemsize if dtype is None else dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    end = (last + 1 if all(size) else offset) * itemsize
    if end > storage.nbytes:
        raise OutlineError(
            f"is damaged: a tensor of shape {size} needs {end:,} bytes of its record {storage.key}, which has "
            f"{storage.nbytes:,}"
        )


def foreign(names: set[str]) -> list[str]:
    """The names that stand for neither tensors nor plain values: to make those, code of others would run."""
    return sorted(name for name in names if name not in PLAIN and not _is_torch_type(name))


def _is_torch_type(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.storage") and last in STORAGES:
        return True
    return module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
