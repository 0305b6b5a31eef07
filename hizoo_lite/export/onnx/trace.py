"""From a traced module to an ONNX model whose weights are read when they are written.

`torch.onnx.export(dynamo=True)` runs the Hugging Face forward itself, once, on tensors without memory, so
that there is no forward of ours to keep up and no copy of a weight.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import onnx_ir as ir
import torch
from torch import Tensor, nn

from hizoo_lite.errors import UserError
from hizoo_lite.export.onnx.linear import Part
from hizoo_lite.export.onnx.optimize import optimize
from hizoo_lite.export.onnx.skeleton import Skeleton
from hizoo_lite.files import check_space
from hizoo_lite.train.progress import Progress

OPSET = 20
#: Between two signs of life while a graph is made.
_ALIVE_SECONDS = 30.0
#: Libraries whose warnings are about their own insides.
_TALKATIVE = ("torch", "onnxscript", "onnx_ir", "onnx")
_WHY_CHARACTERS = 200  # of torch's reason that are shown
_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}


class Input(NamedTuple):
    """A graph input. The example is above 1 in every dynamic dimension: torch takes 0 and 1 for fixed."""

    name: str
    example: Tensor
    dynamic: Mapping[int, str]  # dimension -> its name
    default: Part | None = None  # its value where a run gives none


def trace(
    skeleton: Skeleton,
    wrapper: nn.Module,
    inputs: Sequence[Input],
    outputs: Sequence[str],
    prefix: str,
    progress: Progress,
) -> ir.Model:
    """The ONNX model of `wrapper(*examples)`.

    wrapper: has the skeleton's module as its child `prefix`; takes the inputs in order, flat, and returns a
    flat tuple of tensors. The result's initializers are named as in the skeleton's module.
    """
    with skeleton.mode:
        examples = tuple(torch.empty_like(given.example) for given in inputs)
    dynamic = tuple(dict(given.dynamic) for given in inputs)
    name = type(skeleton.module).__name__
    progress.message(f"tracing {name}: the long part, of minutes if there are many blocks")
    with _noted(progress), _alive(progress, "tracing"), torch.no_grad(), following(skeleton.module):
        program = torch.onnx.export(
            wrapper,
            examples,
            input_names=[given.name for given in inputs],
            output_names=list(outputs),
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        weights = _take_weights(program.model, prefix, skeleton.parts)
    progress.message(f"simplifying {len(program.model.graph)} operators")
    with _noted(progress), _alive(progress, "simplifying"), following(skeleton.module):
        optimize(program.model)
    _give_weights(program.model, weights, skeleton.parts)
    _give_defaults(program.model, inputs)
    return program.model


@contextmanager
def following(module: nn.Module) -> Iterator[None]:
    """While this is open a model's own code runs on tensors without values; `UserError` if it cannot.

    The reasons are as many as there are models: a choice by values (`.item()` of dynamic RoPE), a cache of
    its own kind, sizes that follow from each other.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, torch.onnx.OnnxExporterError) else error
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        why = f"{type(cause or error).__name__}: {' '.join(lines[:2])}"[:_WHY_CHARACTERS]
        raise UserError(
            f"{type(module).__name__} (model type {module.config.model_type!r}) cannot be exported to ONNX: "  # type: ignore[union-attr]
            f"torch {torch.__version__} cannot trace it ({why}); eval, generate and --to merged or peft can "
            "use it"
        ) from error


def _take_weights(model: ir.Model, prefix: str, parts: Mapping[str, Part]) -> list[ir.Value]:
    """Make inputs of the weights, named as in the skeleton: what optimizes must not read one.

    Constants that the model's code makes by itself stay what they are.
    """
    graph, taken = model.graph, []
    for name, value in list(graph.initializers.items()):
        own = name.removeprefix(f"{prefix}.")
        if own in parts:
            del graph.initializers[name]
            value.const_value, value.name = None, own
            graph.inputs.append(value)
            taken.append(value)
    return taken


def _give_weights(model: ir.Model, weights: Sequence[ir.Value], parts: Mapping[str, Part]) -> None:
    """Turn them back into initializers that are read when they are written; equal ones into one."""
    first: dict[Hashable, ir.Value] = {}
    for value in weights:
        model.graph.inputs.remove(value)
        assert value.name is not None
        part = parts[value.name]
        same = value if part.shared is None else first.setdefault(part.shared, value)
        if same is not value:
            value.replace_all_uses_with(same)
        elif value.uses():
            value.const_value = lazy(part, value.name)
            model.graph.register_initializer(value)


def _give_defaults(model: ir.Model, inputs: Sequence[Input]) -> None:
    """An input with an initializer of its name may be left out of a run."""
    by_name = {value.name: value for value in model.graph.inputs}
    for given in inputs:
        if given.default is not None:
            value = by_name[given.name]
            value.const_value = lazy(given.default, given.name)
            model.graph.register_initializer(value)


def lazy(part: Part, name: str) -> ir.LazyTensor:
    """The part as ONNX knows it. It is read anew whenever it is asked for, and not kept."""

    def read() -> ir.Tensor:
        tensor = part.read().contiguous()
        if tensor.dtype == torch.bfloat16:  # numpy has none of its own
            return ir.Tensor(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16), name=name)
        return ir.Tensor(tensor.numpy(), name=name)

    return ir.LazyTensor(read, dtype=_DTYPES[part.dtype], shape=ir.Shape(part.shape), name=name)


def save(graph: ir.Model, path: Path, progress: Progress) -> None:
    """Write the graph to `path` and its weights, one by one, to a file beside it, PATH.data.

    `UserError` if they cannot be written; if there is no room, before anything is.
    """
    weights = [value.const_value for value in graph.graph.initializers.values()]
    check_space(path.parent, sum(weight.nbytes for weight in weights if weight is not None))

    def written(tensor: object, info: Any) -> None:
        if info.index == 0:
            progress.phase("write, tensors", info.total)
        progress.advanced(1)

    try:
        ir.save(graph, path, external_data=f"{path.name}.data", callback=written)
    except OSError as error:  # numpy's, of a disk that is full, says only how many bytes it could write
        why = error.strerror or f"the disk is full ({error})"
        raise UserError(f"{path.parent}: cannot be written: {why}") from error
    finally:
        progress.finish()


@contextmanager
def _alive(progress: Progress, what: str) -> Iterator[None]:
    """Say now and then for how long a call is under way that tells nothing of itself."""
    ended, began = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not ended.wait(_ALIVE_SECONDS):
            progress.message(f"{what}: {time.perf_counter() - began:.0f} s so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _noted(progress: Progress) -> Iterator[None]:
    """Count what torch's exporter and onnxscript say to developers of models, in warnings and in logs."""
    notes = _Notes()
    handlers = {
        handler
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in _TALKATIVE
        for handler in logger.handlers
    } | {*logging.root.handlers, *([logging.lastResort] if logging.lastResort else [])}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for handler in handlers:
            handler.addFilter(notes)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(notes)
            count = notes.count + len(warned)
            if count:
                progress.message(f"torch's exporter had {count} notes for developers of models")


class _Notes(logging.Filter):
    """Counts the records of the talkative libraries and keeps them from being shown."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._last: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Errors are shown."""
        if record.name.partition(".")[0] not in _TALKATIVE or record.levelno >= logging.ERROR:
            return True
        self.count += record is not self._last  # every handler asks
        self._last = record
        return False
