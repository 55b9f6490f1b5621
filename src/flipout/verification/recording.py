"""The operations that a module runs, with their results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from flipout.calls import Call
from flipout.rows import Rows
from flipout.weight import PerturbedWeight, operation_name

__all__ = ["Failing", "Operation", "Place", "Recorder", "names_of", "owners_of", "path_of", "shapes_of", "tensors_of"]


#: An axis, and entries of it; or the member of each entry.
Place = tuple[int, Tensor]


@dataclass
class Operation:
    """A torch operation that a module ran."""

    func: Any
    path: str
    shapes: tuple[tuple[int, ...], ...]
    results: list[Tensor | None] = field(default_factory=list)
    owners: list[Place | None] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether its result is memory that nobody has written."""
        return "empty" in getattr(self.func, "__name__", "")

    def __str__(self) -> str:
        shapes = ", ".join(map(str, self.shapes)) or "no tensors"
        return f"{operation_name(self.func)} in {self.path} (arguments of shape {shapes})"


class Recorder(TorchFunctionMode):
    """Shows the operations of a module, as the module calls them, to a function, or keeps them.

    Args:
        module: whose parts name the operations.
        visit: called with each operation and its results.
        keep: whether to keep copies of the results.
    """

    def __init__(
        self, module: nn.Module, visit: Callable[[Operation, list[Tensor]], None] | None = None, keep: bool = False
    ) -> None:
        super().__init__()
        self._paths = names_of(module)
        self._visit, self._keep, self._depth = visit, keep, 0
        self.count, self.operations = 0, list[Operation]()
        self.dtypes: set[torch.dtype] = set()
        self.call: Call | None = None

    def start(self) -> None:
        """Goes on top of the mode of a call: what the call does for its own purposes is not shown."""
        self._depth += 1
        if self._depth == 1:
            self.call = next((mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, Call)), None)
            self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self._depth -= 1
        if not self._depth:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Records the calls of a module inside."""
        handles = [
            module.register_forward_pre_hook(lambda *_: self.start()),
            module.register_forward_hook(lambda *_: self.stop(), always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = shapes_of(args, kwargs) if self._keep or self._visit else ()
        result = func(*args, **(kwargs or {}))
        results = tensors_of(result)
        if results:
            self.count += 1
            self.dtypes.update(tensor.dtype for tensor in results)
            if self._keep or self._visit is not None:
                operation = Operation(func, path_of(self._paths), shapes)
                with torch._C.DisableTorchFunction():
                    if self._keep:
                        operation.results = [None if type(t) is PerturbedWeight else t.detach().clone() for t in results]
                        operation.owners = [owners_of(self.call, tensor) for tensor in results]
                        self.operations.append(operation)
                    if self._visit is not None:
                        self._visit(operation, results)
        return result


class Failing(TorchFunctionMode):
    """Notes the operation that raises."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._paths = names_of(module)
        self.failed: Operation | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.failed = Operation(func, path_of(self._paths), shapes_of(args, kwargs))
            raise


def names_of(module: nn.Module) -> dict[int, str]:
    return {id(part): name or type(part).__name__ for name, part in module.named_modules()}


def path_of(names: dict[int, str]) -> str:
    """The part of a module whose call the caller is in."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = names.get(id(frame.f_locals.get("self"))) if frame.f_code is _MODULE_CALL else None
        if name is not None:
            return repr(name)
        frame = frame.f_back
    return "the module"


_MODULE_CALL = nn.Module._call_impl.__code__


def shapes_of(args: Any, kwargs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_of((args, kwargs or {})))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of arguments or results, two levels deep at most."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for each in value for tensor in tensors_of(each)] if isinstance(value, (list, tuple)) else []


def owners_of(call: Call | None, tensor: Tensor) -> Place | None:
    """The axis of rows of a result, and the member of each entry, where they were followed."""
    fact = None if call is None else call.tracker.find(tensor)
    if call is None or not isinstance(fact, Rows) or fact.size != tensor.shape[fact.axis]:
        return None
    with torch._C.DisableTorchFunction():
        return fact.axis, call.tracker.owners(fact, tensor.device)
