"""A memory and race checker for kernels that run in Triton's interpreter.

A launch's tensor arguments are the only memory it may touch, element by element: the gaps of a
strided view are out of bounds. These end in ``MemoryFault`` or ``DataRace``:

- a load, store or atomic outside the tensor arguments;
- two programs that store to one address, or one that stores what another loads, in any order
  (atomics may meet atomics);
- lanes of one store that write different values to one address;
- one program that loads and stores one address from different lanes with no ``tl.debug_barrier``
  between: on the device these are different threads, and nothing orders them. Tensors with fewer
  elements than threads count as held by all warps;
- a floating-point atomic: the order of its sums, hence the result, changes from run to run.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as base
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_MANY = 2**31 - 1


class MemoryFault(RuntimeError):
    """An access outside the tensor arguments of its launch."""


class DataRace(RuntimeError):
    """Accesses to one address in one launch whose order the device does not define."""


class _Region:
    """A contiguous piece of a launch's memory, and who touched each of its elements ("cells").

    Time is counted in intervals: one begins with each program and at each barrier inside one. The
    shadow holds, per cell, the interval (0: never) and the lane of the last store and of the last
    load; ``_MANY`` stands for several programs or lanes.
    """

    def __init__(self, tensors: list[tuple[str, torch.Tensor]], lo: int, hi: int) -> None:
        self.names = "/".join(dict.fromkeys(name for name, _ in tensors))
        self.lo, self.hi = lo, hi
        self.cell_size = min(t.element_size() for _, t in tensors)
        self.valid: np.ndarray | None = None
        if not any(_extent(t) == (lo, hi) and _is_dense(t) for _, t in tensors):
            self.valid = np.zeros((hi - lo) // self.cell_size, dtype=np.bool_)
            for _, t in tensors:
                self._mark_valid(self.valid, t)
        self.shadow: np.ndarray | None = None
        # loads wait here for the first store: most regions are only read
        self.unrecorded: list[tuple[np.ndarray, np.ndarray, int, int]] = []

    def _mark_valid(self, valid: np.ndarray, t: torch.Tensor) -> None:
        per_element = t.element_size() // self.cell_size
        first = (t.data_ptr() - self.lo) // self.cell_size
        # numpy counts strides in bytes, and a cell of `valid` is one byte
        strides = [stride * per_element for stride in t.stride()]
        for cell in range(first, first + per_element):
            np.lib.stride_tricks.as_strided(valid[cell:], tuple(t.shape), strides)[...] = True

    def cells(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """``[lanes, cells per access]``."""
        cells = (addresses - np.uint64(self.lo)).astype(np.int64) // self.cell_size
        return cells[:, None] + np.arange(max(size // self.cell_size, 1))

    def load(self, cells: np.ndarray, lanes: np.ndarray, now: int, program: int) -> None:
        if self.shadow is None:
            self.unrecorded.append((cells, lanes, now, program))
            return
        writer, writer_lane, reader, reader_lane, _ = self.shadow
        _require_order(("loads", "stored"), writer[cells], writer_lane[cells], lanes, now, program)
        before = reader[cells]
        several = (before == now) & (reader_lane[cells] != lanes)
        reader_lane[cells] = lanes
        # two lanes of this very load may share a cell
        several |= reader_lane[cells] != lanes
        reader_lane[cells[several]] = _MANY
        mine = (before == 0) | ((before >= program) & (before != _MANY))
        reader[cells] = np.where(mine, now, _MANY)

    def store(
        self, cells: np.ndarray, lanes: np.ndarray, now: int, program: int, *, atomic: bool
    ) -> None:
        if self.shadow is None:
            self.shadow = np.zeros((5, (self.hi - self.lo) // self.cell_size), dtype=np.int32)
            for earlier in self.unrecorded:
                self.load(*earlier)
            self.unrecorded.clear()
        writer, writer_lane, reader, reader_lane, by_atomic = self.shadow
        _require_order(("stores", "loaded"), reader[cells], reader_lane[cells], lanes, now, program)
        stored = np.where(by_atomic[cells] & atomic, 0, writer[cells])
        _require_order(("stores", "stored"), stored, writer_lane[cells], lanes, now, program)
        writer[cells], writer_lane[cells], by_atomic[cells] = now, lanes, atomic


def _require_order(
    verbs: tuple[str, str],
    seen: np.ndarray,
    seen_lanes: np.ndarray,
    lanes: np.ndarray,
    now: int,
    program: int,
) -> None:
    does, did = verbs
    if ((seen != 0) & ((seen < program) | (seen == _MANY))).any():
        raise DataRace(f"{does} what another program {did} in the same launch")
    if ((seen == now) & (seen_lanes != lanes)).any():
        raise DataRace(
            f"{does} what another thread of this program {did}, with no tl.debug_barrier"
        )


class _Launch:
    """The memory of one launch and its clock."""

    def __init__(self, kernel: str, arguments: dict[str, Any], num_warps: int) -> None:
        self.kernel = kernel
        # Triton copies tensors of fewer elements than threads into all warps
        self.replicated_below = 32 * num_warps if num_warps > 1 else 0
        tensors = [pair for name, x in arguments.items() for pair in _tensors(name, x)]
        spans = sorted((*_extent(t), name, i) for i, (name, t) in enumerate(tensors) if t.numel())
        groups: list[tuple[int, int, list[tuple[str, torch.Tensor]]]] = []
        for lo, hi, _, i in spans:
            if groups and lo < groups[-1][1]:
                first, last, members = groups.pop()
                groups.append((first, max(last, hi), [*members, tensors[i]]))
            else:
                groups.append((lo, hi, [tensors[i]]))
        self.regions = [_Region(members, lo, hi) for lo, hi, members in groups]
        self.starts = [region.lo for region in self.regions]
        self.now = self.program = 0

    def begin_program(self) -> None:
        self.now += 1
        self.program = self.now

    def barrier(self) -> None:
        self.now += 1

    def access(self, kind: str, ptrs: np.ndarray, mask: Any, dtype: np.dtype) -> None:
        mask = np.broadcast_to(np.asarray(mask), ptrs.shape)
        lanes = np.flatnonzero(mask)
        addresses = ptrs[mask]
        if not lanes.size:
            return
        try:
            for region, chosen in self._split(addresses, dtype.itemsize, kind):
                cells = region.cells(addresses[chosen], dtype.itemsize)
                if region.valid is not None and not region.valid[cells].all():
                    raise MemoryFault(f"{kind} between the elements of {region.names}")
                here = lanes[chosen][:, None]
                if kind == "load":
                    if ptrs.size < self.replicated_below:
                        here = np.full_like(here, _MANY)
                    region.load(cells, here, self.now, self.program)
                else:
                    region.store(cells, here, self.now, self.program, atomic=kind == "atomic")
        except (MemoryFault, DataRace) as error:
            program = base.interpreter_builder.grid_idx
            raise type(error)(f"{self.kernel}, program {program}: {error}") from None

    def _split(
        self, addresses: np.ndarray, size: int, kind: str
    ) -> Iterator[tuple[_Region, np.ndarray | slice]]:
        """The regions that an access touches, each with the lanes that touch it."""
        first, last = int(addresses.min()), int(addresses.max())
        at = bisect.bisect_right(self.starts, first) - 1
        if at >= 0 and last + size <= self.regions[at].hi:
            yield self.regions[at], slice(None)
            return
        which = np.searchsorted(np.array(self.starts, np.uint64), addresses, side="right") - 1
        ends = np.array([region.hi for region in self.regions], np.uint64)
        outside = (which < 0) | (addresses + np.uint64(size) > ends[which])
        if outside.any():
            where = self._nearest(int(addresses[outside][0]))
            raise MemoryFault(f"{kind} out of bounds in {int(outside.sum())} lanes, first {where}")
        for index in np.unique(which):
            yield self.regions[index], which == index

    def _nearest(self, address: int) -> str:
        def gap(region: _Region) -> int:
            return region.lo - address if address < region.lo else address - region.hi

        region = min(self.regions, key=gap)
        side = "before" if address < region.lo else "past the end of"
        return f"{gap(region)} bytes {side} {region.names}"


def _tensors(name: str, x: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(x, torch.Tensor):
        yield name, x
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _tensors(name, item)
    elif hasattr(x, "base"):
        # a TensorDescriptor, or a tensor reinterpreted as another dtype
        yield from _tensors(name, x.base)


def _extent(t: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()


def _is_dense(t: torch.Tensor) -> bool:
    lo, hi = _extent(t)
    spread = all(stride > 0 for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)
    return spread and t.numel() * t.element_size() == hi - lo


def _require_one_value(ptrs: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
    addresses, bits = ptrs[mask], values[mask].view(f"u{values.itemsize}")
    order = np.argsort(addresses, kind="stable")
    addresses, bits = addresses[order], bits[order]
    if ((addresses[1:] == addresses[:-1]) & (bits[1:] != bits[:-1])).any():
        raise DataRace("lanes of one store write different values to one address")


def install() -> None:
    """Watch every launch of Triton's interpreter from now on."""
    launches: list[_Launch] = []
    call, builder = GridExecutor.__call__, InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
    set_grid_idx = builder.set_grid_idx

    def watched_call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(_Launch(self.fn.__name__, arguments, kwargs.get("num_warps", 4)))
        try:
            # overflow to inf and inf - inf are ordinary arithmetic on a device
            with np.errstate(all="ignore"):
                call(self, *args, **kwargs)
        finally:
            launches.pop()

    def watched_grid_idx(self: Any, *index: int) -> None:
        set_grid_idx(self, *index)
        launches[-1].begin_program()

    def watched_load(self: Any, ptrs: TensorHandle, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        dtype = base._get_np_dtype(ptrs.get_element_ty())
        launches[-1].access("load", ptrs.data, mask.data, dtype)
        return load(self, ptrs, mask, *rest, **kwargs)

    def watched_store(
        self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        where = np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)
        _require_one_value(ptrs.data, np.broadcast_to(value.data, ptrs.data.shape), where)
        launches[-1].access("store", ptrs.data, where, value.data.dtype)
        return store(self, ptrs, value, mask, *rest)

    def watched_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        if op == base._ir.ATOMIC_OP.FADD:
            raise DataRace("a floating-point atomic sums in an order that changes from run to run")
        launches[-1].access("atomic", ptr.data, mask.data, val.data.dtype)
        return rmw(self, op, ptr, val, mask, *rest)

    def watched_cas(self: Any, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        launches[-1].access("atomic", ptr.data, True, val.data.dtype)
        return cas(self, ptr, cmp, val, *rest)

    GridExecutor.__call__ = watched_call
    builder.set_grid_idx = watched_grid_idx
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw, builder.create_atomic_cas = watched_rmw, watched_cas
    builder.create_barrier = lambda self: launches[-1].barrier()
