"""Memory: what a pass takes as a function of its samples, what there is, and recognising that it ran out."""

from __future__ import annotations

import gc
import math
import numbers
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn.parameter import is_lazy

__all__ = [
    "MemoryModel",
    "PeakMemory",
    "SavedBytes",
    "allocated_bytes",
    "device_budget",
    "device_memory",
    "free_memory",
    "is_hook_refusal",
    "is_out_of_memory",
    "measure_memory",
    "parse_budget",
    "resident_bytes",
    "usable_memory",
]

_RING = 32  # passes remembered per size
_MOST_SIZES = 32
_APART = 1.1  # over closer sizes the allocator's steps would decide the slope
_MARGIN = 0.05  # of the device, left for fragmentation and for libraries with an allocation of their own


class _Point(NamedTuple):
    """A size and the bytes its passes peak at."""

    samples: int
    bytes: float


class _Line(NamedTuple):
    fixed: float
    per_sample: float


class MemoryModel:
    """Peak bytes of a forward/backward pass as a function of its samples, learned while training.

    ``bytes(n) = fixed + per_sample * n``. A real peak is a *maximum* of such lines (few samples: the
    gradients at the end of backward; many: the activations at its start), so the line goes through the
    largest measured size and is the steepest over any smaller one at least 1.1x apart: on a maximum of
    lines that is the line of the two largest sizes, and a single bad reading cannot flatten it. A
    prediction is also never below what a smaller size was measured to take, which makes it exact on both
    sides of the usual bend, a constant that becomes a line.

    The bytes of a size are those that 9 in 10 of its last 32 passes stay within (below 10 passes: the
    highest), so allocator steps and samples of unequal length count with their high values and a single
    outlier is forgotten. A size that is measured to take less than a smaller one disproves the smaller
    one's reading. At most 32 sizes are kept, the most recently measured.

    Which bytes they are is the caller's choice, as long as it is always the same and the budget is in
    the same: on CUDA the allocator's peak, on other devices the bytes saved for backward
    (:func:`measure_memory`). The line is known where it was measured: below a bend that was not reached
    yet it promises too much, so a caller should not go beyond twice the largest measured size at once.

    Example:
        >>> model = MemoryModel()
        >>> for size in (1, 16, 32):
        ...     model.update(size, max(200, 100 + 10 * size))
        >>> model.fixed, model.per_sample, model.predict(2), model.largest(1000)
        (100.0, 10.0, 200.0, 90)
    """

    def __init__(self) -> None:
        self._peaks: dict[int, deque[float]] = {}  # least recently measured first
        self._points: list[_Point] | None = None

    def update(self, samples: int, bytes: float) -> None:
        """Records the peak of one pass.

        Args:
            samples: samples of the pass, at least 1.
            bytes: its peak; skipped unless positive and finite.

        Raises:
            ValueError: ``samples`` is below 1.
        """
        if not 1 <= samples < math.inf:
            raise ValueError(f"samples={samples} was measured, but a pass has at least 1 sample.")
        if not 0 < bytes < math.inf:
            return
        peaks = self._peaks.pop(int(samples), None)
        if peaks is None:
            peaks = deque(maxlen=_RING)
            if len(self._peaks) >= _MOST_SIZES:
                del self._peaks[next(iter(self._peaks))]
        peaks.append(float(bytes))
        self._peaks[int(samples)] = peaks
        self._points = None

    @property
    def measured(self) -> list[int]:
        """The sizes measured, ascending."""
        return [point.samples for point in self._measurements()]

    @property
    def fixed(self) -> float:
        """Bytes of a pass whatever its size; NaN until two sizes 1.1x apart are measured."""
        return self._line().fixed

    @property
    def per_sample(self) -> float:
        """Bytes per sample, never negative; NaN until two sizes 1.1x apart are measured."""
        return self._line().per_sample

    def predict(self, samples: float) -> float:
        """Returns the peak bytes of a pass over ``samples``; NaN while the line is not identified.

        Raises:
            ValueError: ``samples`` is not positive.
        """
        if not samples > 0:
            raise ValueError(f"The memory of {samples} samples was asked for: ask for more than 0.")
        line = self._line()
        if math.isnan(line.per_sample):
            return math.nan
        below = (point.bytes for point in self._measurements() if point.samples <= samples)
        return max(line.fixed + line.per_sample * samples, *below, 0.0)

    def largest(self, budget: float) -> int:
        """Returns the largest number of samples whose peak is within ``budget`` bytes.

        While there is no slope to go by (fewer than two sizes, or the largest ones peak alike) it is
        what certainly fits: a maximum of lines with non-negative ``fixed`` takes per sample never more
        at a larger size, so from ``n`` samples in ``b`` bytes at least ``n * budget / b`` fit. Nothing
        of the kind holds downwards: there it is the largest size measured within the budget.

        Returns:
            0 if no size is known or predicted to fit. Before the first measurement, or after a single
            one above the budget, that only says that nothing is known: try fewer samples.

        Raises:
            ValueError: ``budget`` is not a finite number.
        """
        if not math.isfinite(budget):
            raise ValueError(f"budget={budget} bytes is no limit to keep within; give a finite number.")
        points = self._measurements()
        fitting = [point for point in points if point.bytes <= budget]
        per_sample = self._line().per_sample
        if not per_sample > 0:
            if len(fitting) < len(points) or not points:
                return fitting[-1].samples if fitting else 0
            return int(points[-1].samples * budget / points[-1].bytes)
        too_large = points[len(fitting)].samples if len(fitting) < len(points) else math.inf
        # From the largest measured size, as exact as its bytes are.
        beyond = math.floor((budget - points[-1].bytes) / per_sample)
        return int(max(0, min(points[-1].samples + beyond, too_large - 1)))

    def state_dict(self) -> dict[str, Any]:
        """Returns the measurements as plain numbers."""
        return {"peaks": [[samples, peak] for samples, peaks in self._peaks.items() for peak in peaks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is not one of this class; nothing is changed then.
        """
        if not isinstance(state, Mapping) or set(state) != {"peaks"}:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"A MemoryModel state has the key peaks, not {found}.")
        loaded = MemoryModel()
        for peak in _checked_peaks(state["peaks"]):
            loaded.update(*peak)
        self._peaks, self._points = loaded._peaks, None

    def _measurements(self) -> list[_Point]:
        """Size and peak, ascending in both."""
        if self._points is None:
            self._points = []
            for samples in sorted(self._peaks, reverse=True):
                peak = _nine_in_ten(self._peaks[samples])
                larger = self._points[-1].bytes if self._points else math.inf
                self._points.append(_Point(samples, min(peak, larger)))
            self._points.reverse()
        return self._points

    def _line(self) -> _Line:
        *smaller, last = self._measurements() or [_Point(0, math.nan)]
        slopes = [
            (last.bytes - point.bytes) / (last.samples - point.samples)
            for point in smaller
            if point.samples * _APART <= last.samples
        ]
        if not slopes:
            return _Line(math.nan, math.nan)
        return _Line(last.bytes - max(slopes) * last.samples, max(slopes))


def _nine_in_ten(values: Iterable[float]) -> float:
    """The lowest value that at least nine in ten do not exceed."""
    ascending = sorted(values)
    return ascending[len(ascending) - 1 - len(ascending) // 10]


def _checked_peaks(peaks: object) -> Iterator[tuple[int, float]]:
    if not isinstance(peaks, (list, tuple)):
        raise ValueError(f"A MemoryModel state holds a list of [samples, bytes], not {peaks!r}.")
    for peak in peaks:
        if not _is_peak(peak):
            raise ValueError(f"A MemoryModel state holds [samples >= 1, bytes > 0], not {peak!r}.")
        yield peak[0], peak[1]


def _is_peak(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    samples, size = value
    if type(samples) is not int or type(size) not in (int, float):
        return False
    return samples >= 1 and 0 < size < math.inf


# --- What there is ----------------------------------------------------------------------------------------

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)b\s*", re.IGNORECASE)


def parse_budget(budget: int | float | str, total_bytes: int | None) -> int:
    """Returns a memory budget in bytes.

    Args:
        budget: bytes as an integer, a size such as ``"20GiB"``, ``"512 MiB"`` or ``"20 GB"`` (GiB is
            1024^3 bytes, GB is 1000^3), or a fraction of the device as a float in (0, 1].
        total_bytes: the device's memory; None where it has none of its own, which leaves no fractions.

    Raises:
        TypeError: the budget is neither a number nor a string.
        ValueError: it is not one of the three forms, or not positive.
    """
    if isinstance(budget, bool) or not isinstance(budget, (numbers.Real, str)):
        raise TypeError(
            f"memory_budget={budget!r} is of type {type(budget).__name__}; give bytes as an integer, a size "
            'such as "20GiB", or a fraction of the device as a float.'
        )
    if isinstance(budget, str):
        size = _parse_size(budget)
    elif isinstance(budget, numbers.Integral):
        size = int(budget)
    else:
        size = _parse_fraction(float(budget), total_bytes)
    if size < 1:
        raise ValueError(f"memory_budget={budget!r} leaves no memory; give at least 1 byte.")
    return size


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(
            f'memory_budget={text!r} is not a size; write a number with a unit, such as "20GiB" or "512 MB".'
        )
    number, prefix, binary = match.groups()
    unit = 1024 if binary else 1000
    return int(float(number) * unit ** " kmgt".index(prefix.lower() or " "))


def _parse_fraction(fraction: float, total_bytes: int | None) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(
            f"memory_budget={fraction!r} is not a fraction of the device; give a float in (0, 1], or bytes "
            "as an integer."
        )
    if total_bytes is None:
        raise ValueError(
            f"memory_budget={fraction!r} is a fraction, but this device has no memory of its own to take it "
            'of; give bytes, such as "2GiB".'
        )
    return int(fraction * total_bytes)


def device_memory(device: torch.device | str) -> int | None:
    """All memory of a CUDA device in bytes; None for devices without an allocator that counts."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def device_budget(device: torch.device | str) -> int | None:
    """Returns the bytes up to which this process can allocate on the device now, less 5 %.

    In the unit of :class:`PeakMemory`: what is allocated already counts as used. It is the free memory
    plus all that PyTorch's allocator holds, capped by ``torch.cuda.set_per_process_memory_fraction``
    (where this PyTorch can read it back; otherwise the cap is not seen). The 5 % are for fragmentation and
    for libraries that allocate on their own. It asks the driver: call it now and then, not per pass.

    Returns:
        None for devices other than CUDA: bytes saved for backward are not what their memory holds, so
        only the user can set a budget.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    read_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    fraction = 1.0 if read_fraction is None else read_fraction(device)
    usable = min(free + torch.cuda.memory_reserved(device), fraction * total)
    return int(usable * (1 - _MARGIN))


def usable_memory(budget: int | float | str | None, device: torch.device) -> int | None:
    """The user's budget in bytes; without one :func:`device_budget`, so ``None`` on a CPU: no bound."""
    return device_budget(device) if budget is None else parse_budget(budget, device_memory(device))


def allocated_bytes(device: torch.device | str) -> int:
    """Bytes allocated on a CUDA device now, in the unit of :class:`PeakMemory`; 0 on other devices."""
    device = torch.device(device)
    return _allocated(torch.cuda.device(device).idx)[0] if device.type == "cuda" else 0


def resident_bytes() -> float:
    """The resident size of this process in bytes; coarse.

    It moves in the steps of the C heap, which hardly ever gives back, and says nothing about a single
    pass. Where the system has no ``/proc`` it is the highest so far, and NaN on Windows.
    """
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    statm = Path("/proc/self/statm")
    if statm.exists():
        return float(statm.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def free_memory(device: torch.device | str) -> None:
    """Collects garbage and gives the allocator's unused memory back to the device.

    Call it after the ``except`` block that caught an out-of-memory error: inside, its traceback still
    holds the tensors of the failed pass.
    """
    gc.collect()
    backend = getattr(torch, torch.device(device).type, None)
    empty_cache = getattr(backend, "empty_cache", None)  # the CPU has none
    if empty_cache is not None:
        empty_cache()


# --- Running out of it ------------------------------------------------------------------------------------

_OUT_OF_MEMORY = re.compile(
    r"""
      \b(?:CUDA|HIP|XPU|MPS|HPU|NPU)(?:\ error:|\ backend)?\ out\ of\ memory
    | out\ of\ memory (?: \W*$ | \s*[^\w\s] | \s+at\b )    # as a statement: "out of memory slots" is another
    | \b[A-Z]+_(?:STATUS_)?ALLOC_FAILED\b                  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT, hipBLAS
    | \bCUDNN_STATUS_INTERNAL_ERROR_\w+_ALLOCATION_FAILED  # cuDNN 9
    | CUDNN_STATUS_NOT_SUPPORTED\.                         # cuDNN without room for its workspace
    | [Uu]nable\ to\ find\ a\ valid\ cuDNN\ algorithm      # the same
    | \w_ERROR_OUT_OF_(?:\w+_)?(?:MEMORY|RESOURCES)\b      # SYCL (XPU)
    | MODULE:PT_DEVMEM\ Allocation\ failed                 # HPU
    | DefaultCPUAllocator:\ (?:can't\ allocate|not\ enough)\ memory
    | std::bad_alloc
    """,
    re.VERBOSE | re.MULTILINE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a pass needed more memory than there was.

    True for ``torch.OutOfMemoryError``, ``MemoryError``, and a ``RuntimeError`` with one of the messages
    of PyTorch's back ends and libraries (CUDA, ROCm, XPU, MPS, HPU, CPU, cuBLAS, cuDNN and their like);
    also for an error raised *from* one of these (``raise ... from error``), which names it as its cause.
    False for errors of any other type whatever they say, for one raised while another was handled, and
    for errors of NCCL, after which the process group cannot be used.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if _says_out_of_memory(cause):
            return True
        seen.add(id(cause))
        cause = cause.__cause__
    return False


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):  # the name in every version
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return "nccl" not in message.lower() and _OUT_OF_MEMORY.search(message) is not None


# --- Measuring a pass -------------------------------------------------------------------------------------


def measure_memory(device: torch.device | str, resident: Iterable[Tensor] = ()) -> PeakMemory | SavedBytes:
    """Returns a context for one pass, ``with ... as m:``; ``m.bytes`` is then what the pass took.

    Args:
        device: where the pass runs; :class:`PeakMemory` on CUDA, :class:`SavedBytes` anywhere else.
        resident: tensors that are in memory anyway (parameters, buffers) and that :class:`SavedBytes`
            leaves out.
    """
    device = torch.device(device)
    return PeakMemory(device) if device.type == "cuda" else SavedBytes(resident, device)


class PeakMemory:
    """The most bytes allocated on a CUDA device at any moment of a ``with`` block.

    Read from PyTorch's allocator without waiting for the device. It counts all that is allocated, the
    model and the optimizer's state included. A peak since some moment can only be had by resetting the
    allocator's own: ``torch.cuda.max_memory_allocated()`` counts from the last measured block on. Blocks
    may be nested; the outer one still sees its whole peak.

    Attributes:
        bytes: the peak; 0 until the block has ended.
        before: bytes allocated when the block began.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.bytes = self.before = 0
        self._device = torch.cuda.device(device).idx

    def __enter__(self) -> PeakMemory:
        self.before, peak = _allocated(self._device)
        for block in _running_peaks:
            if block._device == self._device:
                block.bytes = max(block.bytes, peak)
        torch.cuda.reset_peak_memory_stats(self._device)
        _running_peaks.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _running_peaks.remove(self)
        self.bytes = max(self.bytes, _allocated(self._device)[1])


_running_peaks: list[PeakMemory] = []  # of the whole process, as the allocator is


def _allocated(device: int) -> tuple[int, int]:
    """Bytes allocated now and at the peak; one call, and much cheaper than the flattened statistics."""
    statistics = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
    return statistics["current"], statistics["peak"]


class SavedBytes:
    """The most bytes that autograd holds for backward at any moment of a ``with`` block.

    Counted by hooks on saved tensors, so it is the same in every run and exactly linear in the samples
    wherever the layers are: a size need not be measured often, which costs some microseconds per saved
    tensor. It is less than the whole need of a pass: temporaries, gradients and outputs that backward
    does not use are not in it.

    - A storage counts once, however many views of it are saved. What did not come out of the graph (a
      batch, a mask) counts with the part that is saved, so a micro-batch that is a view of its batch
      counts with its own samples.
    - Tensors count for as long as the graph holds them; the meter holds none.
    - Results are unchanged, and the check for tensors modified in place still works. What is not
      possible inside the block are ``torch.func.grad``, ``vjp``, ``jacrev`` and ``hessian``: they refuse
      to run under any hook, see :func:`is_hook_refusal`.
    - Hooks of the user's own (``save_on_cpu``, non-reentrant checkpoints) are left alone: what they take
      inside the block is theirs and not counted, and in a block *inside* them nothing is (``bytes``
      stays 0, which :meth:`MemoryModel.update` skips).
    - Blocks may be nested. Hooks belong to a thread: passes in other threads are not counted.

    Attributes:
        bytes: the peak so far.

    Args:
        resident: tensors that are in memory anyway: their storages are left out.
        device: only tensors on this type of device count.
    """

    before = 0  # what is held anyway is not counted

    def __init__(self, resident: Iterable[Tensor] = (), device: torch.device | str = "cpu") -> None:
        self.bytes = 0
        self._held = 0
        self._storages: dict[int, _Storage] = {}
        self._device_type = torch.device(device).type
        self._resident = {address for tensor in resident for address, _ in _pieces(tensor)}
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> SavedBytes:
        if _hooks_are_free():
            self._hooks = saved_tensors_hooks(_pack, _unpack)
            self._hooks.__enter__()
        _meters.running.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _meters.running.remove(self)
        if self._hooks is not None:
            self._hooks.__exit__(*exc_info)
            self._hooks = None

    def _hold(self, tensor: Tensor, pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[SavedBytes, int]]:
        """Counts a tensor in; yields what to let go of when it is dropped."""
        if tensor.device.type != self._device_type:
            return
        for address, size in pieces:
            if address not in self._resident:
                storage = self._storages.setdefault(address, _Storage())
                self._held += max(0, size - storage.bytes)
                self.bytes = max(self.bytes, self._held)
                storage.bytes = max(size, storage.bytes)
                storage.times += 1
                yield self, address

    def _let_go(self, address: int) -> None:
        storage = self._storages[address]
        storage.times -= 1
        if storage.times == 0:
            self._held -= storage.bytes
            del self._storages[address]


class _Storage:
    """What a storage that is saved at least once counts."""

    __slots__ = ("bytes", "times")

    def __init__(self) -> None:
        self.bytes = self.times = 0


class _Meters(threading.local):
    """The blocks entered in this thread; only the outermost can have set the hooks."""

    def __init__(self) -> None:
        self.running: list[SavedBytes] = []


_meters = _Meters()


class _Saved:
    """A saved tensor in the graph; when the graph drops it, the meters hear of it."""

    __slots__ = ("holds", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        pieces = _pieces(tensor)
        self.holds = [hold for meter in _meters.running for hold in meter._hold(tensor, pieces)]
        self.tensor = tensor.detach()  # the tensor itself would be a cycle where a node saves its output
        self.version = tensor._version

    def __del__(self) -> None:
        for meter, address in self.holds:
            meter._let_go(address)


def _pack(tensor: Tensor) -> _Saved:
    return _Saved(tensor)


def _unpack(saved: _Saved) -> Tensor:
    # Autograd checks this itself, but not where hooks have packed the tensor.
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of shape {list(saved.tensor.shape)} is at version "
            f"{saved.tensor._version}; expected version {saved.version} instead."
        )
    return saved.tensor


def _hooks_are_free() -> bool:
    """Whether hooks may be set, and would replace nobody's: only the innermost pair is in force."""
    try:
        with disable_saved_tensors_hooks(""):
            pass
        with saved_tensors_hooks(_pack, _unpack):
            return True
    except RuntimeError:
        return False


def is_hook_refusal(error: BaseException) -> bool:
    """Whether an error is ``torch.func`` refusing to run because of :class:`SavedBytes`' hooks.

    The pass is not at fault then, and works when it is not measured.
    """
    return isinstance(error, RuntimeError) and "support saved tensor hooks" in str(error)


def _pieces(tensor: Tensor) -> list[tuple[int, int]]:
    """Address and bytes of each storage that a tensor is in; none if it is not in memory."""
    try:
        return [
            (storage.data_ptr(), _span(part) if tensor.is_leaf else storage.nbytes())
            for part in _strided_parts(tensor)
            for storage in [part.untyped_storage()]
        ]
    except RuntimeError:  # a tensor without an address, such as a fake one: nothing to count
        return []


def _strided_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor (sparse, nested, or of a wrapper class) is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _strided_parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.layout is torch.strided and not is_lazy(tensor):
        yield tensor


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + steps) * tensor.element_size()
