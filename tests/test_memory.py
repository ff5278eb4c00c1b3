from __future__ import annotations

import gc
import io
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from adaptive_batch.memory import (
    MemoryModel,
    PeakMemory,
    SavedBytes,
    device_budget,
    device_memory,
    free_memory,
    is_hook_refusal,
    is_out_of_memory,
    measure_memory,
    parse_budget,
    resident_bytes,
)

MIB = 2**20
GIB = 2**30


# --- The model --------------------------------------------------------------------------------------------


def model_of(peaks: Mapping[int, float]) -> MemoryModel:
    model = MemoryModel()
    for samples, peak in peaks.items():
        model.update(samples, peak)
    return model


def assert_unknown(model: MemoryModel) -> None:
    assert math.isnan(model.fixed) and math.isnan(model.per_sample) and math.isnan(model.predict(8))


def test_nothing_is_known_before_the_first_pass():
    model = MemoryModel()
    assert_unknown(model)
    assert model.measured == []
    assert model.largest(GIB) == 0


fixed_bytes = st.integers(0, 10**11)
sample_bytes = st.integers(1, 10**9)
two_sizes = st.tuples(st.integers(1, 4096), st.integers(1, 4096)).filter(lambda s: max(s) >= 1.1 * min(s))


@given(fixed_bytes, sample_bytes, two_sizes, st.integers(1, 100_000))
def test_a_line_is_reproduced_exactly_from_any_two_sizes(fixed, per_sample, sizes, samples):
    model = model_of({n: fixed + per_sample * n for n in sizes})
    assert model.fixed == fixed and model.per_sample == per_sample
    if samples > max(sizes):
        assert model.predict(samples) == fixed + per_sample * samples
        assert model.largest(fixed + per_sample * samples) == samples
        assert model.largest(fixed + per_sample * samples - 1) == samples - 1


@given(
    fixed_bytes,
    sample_bytes,
    st.floats(0, 1),
    st.integers(1, 64),
    st.lists(st.integers(2, 64), min_size=1, max_size=5),
    st.integers(1, 10_000),
)
def test_a_maximum_of_two_lines_is_exact_beyond_the_bend(fixed, per_sample, flatter, bend, below, samples):
    """The first line is steeper below the bend in nothing but its start: gradients before activations."""
    slope = int(flatter * per_sample)
    start = fixed + (per_sample - slope) * bend  # the lines cross at `bend`

    def peak(n):
        return max(start + slope * n, fixed + per_sample * n)

    sizes = {max(1, bend // n) for n in below} | {2 * bend, 4 * bend}
    model = model_of({n: peak(n) for n in sizes})
    assert model.fixed == fixed and model.per_sample == per_sample
    assert model.predict(2 * bend + samples) == peak(2 * bend + samples)
    assert model.largest(peak(2 * bend + samples)) == 2 * bend + samples


def test_a_constant_that_becomes_a_line_is_exact_on_both_sides():
    def peak(n):
        return max(500, 100 + 10 * n)

    model = model_of({n: peak(n) for n in (1, 2, 60, 80)})
    assert [model.predict(n) for n in (1, 7, 39, 41, 50, 1000)] == [peak(n) for n in (1, 7, 39, 41, 50, 1000)]
    assert model.largest(499) == 0  # the line alone would let 39 samples in
    assert model.largest(500) == 40


@given(
    st.dictionaries(st.integers(1, 512), st.integers(1, 10**6), min_size=2, max_size=12),
    st.integers(0, 10**7),
)
def test_whatever_was_measured_the_largest_size_is_the_last_predicted_to_fit(peaks, budget):
    model = model_of(peaks)
    sizes = range(1, 2000)
    predictions = [model.predict(n) for n in sizes]
    if math.isnan(predictions[0]) or model.per_sample == 0:
        return
    assert predictions == sorted(predictions)
    largest = model.largest(budget)
    slack = 1e-9 * max(peaks.values())  # slopes are not whole numbers here
    if largest >= 1:
        assert model.predict(largest) <= budget + slack
    assert model.predict(largest + 1) > budget - slack


@pytest.mark.parametrize("step", [512, 2 * MIB])
def test_the_steps_of_an_allocator_cost_less_than_a_per_cent(step):
    fixed, per_sample = 700 * MIB + 12345, 3 * MIB + 777

    def stepped(n):
        return -(-(fixed + per_sample * n) // step) * step

    model = model_of({n: stepped(n) for n in (8, 16, 32, 64, 128)})
    assert model.predict(512) == pytest.approx(fixed + per_sample * 512, rel=0.01)
    true = max(n for n in range(1, 10_000) if stepped(n) <= 16 * GIB)
    assert model.largest(16 * GIB) == pytest.approx(true, rel=0.02)


@given(st.lists(st.integers(0, 20), min_size=6, max_size=6))
def test_blocks_of_up_to_a_mebibyte_too_much_cost_a_few_per_cent(waste):
    fixed, per_sample = 700 * MIB, 10 * MIB
    sizes = (8, 16, 32, 64, 128, 256)
    model = model_of({n: fixed + per_sample * n + w * MIB for n, w in zip(sizes, waste, strict=True)})
    assert model.predict(512) == pytest.approx(fixed + per_sample * 512, rel=0.04)


def test_one_freak_reading_neither_flattens_the_line_nor_forbids_what_larger_sizes_disprove():
    peaks = {n: 100 + 10 * n for n in (8, 16, 32, 64)}
    model = model_of(peaks | {32: 700, 3: 10_000})
    assert (model.fixed, model.per_sample) == (100, 10)
    assert model.largest(740) == 64


def test_of_many_passes_of_a_size_the_value_that_nine_in_ten_stay_within_counts():
    model = model_of({16: 260})
    for i in range(1, 31):
        model.update(32, 420 + (80 if i % 15 == 0 else i % 2))
    assert model.predict(32) == 421


def test_few_passes_of_a_size_count_with_their_highest():
    model = model_of({16: 260})
    for peak in (400, 420, 410):
        model.update(32, peak)
    assert model.predict(32) == 420


def test_old_passes_are_forgotten():
    model = model_of({16: 260})
    for peak in [900] * 32 + [420] * 32:
        model.update(32, peak)
    assert model.predict(64) == 740


def test_memory_of_the_model_itself_is_bounded_and_the_latest_sizes_stay():
    model = MemoryModel()
    for samples in range(1, 200):
        for _ in range(100):
            model.update(samples, 100 + 10 * samples)
    assert model.measured == list(range(168, 200))
    assert len(model.state_dict()["peaks"]) == 32 * 32
    model.update(168, 1780)
    model.update(300, 3100)
    assert model.measured == [168, *range(170, 200), 300]


def test_sizes_that_are_too_close_identify_nothing():
    model = model_of({33: 1000, 34: 1512})
    assert_unknown(model)
    assert model.measured == [33, 34]


def test_from_one_size_only_what_certainly_fits_is_proposed():
    model = model_of({16: 1000})
    assert model.largest(999) == 0  # half of it may peak as high
    assert model.largest(1000) == 16
    assert model.largest(2500) == 40  # at worst all is per sample


@given(
    st.lists(st.tuples(fixed_bytes, st.integers(0, 10**9)), min_size=1, max_size=4),
    st.integers(1, 1000),
    st.integers(0, 10**13),
)
def test_a_proposal_from_one_size_fits_for_every_maximum_of_lines(lines, size, budget):
    def peak(n):
        return max(fixed + per_sample * n for fixed, per_sample in lines)

    if peak(size) > 0:
        proposed = model_of({size: peak(size)}).largest(budget)
        assert proposed == 0 or peak(proposed) <= budget


def test_sizes_that_peak_alike_promise_no_more_than_one_of_them():
    model = model_of({1: 500, 2: 500, 4: 500})
    assert model.per_sample == 0 and model.predict(64) == 500
    assert model.largest(1000) == 8
    assert model.largest(400) == 0


def test_one_sample_that_does_not_fit_is_zero():
    model = model_of({1: 110, 2: 120})
    assert model.largest(109) == 0 and model.largest(-5) == 0
    assert model.largest(110) == 1


def test_steeper_than_proportional_is_predicted_as_measured():
    model = model_of({4: 16, 8: 64, 16: 256})  # pairs of samples
    assert model.predict(32) == 640
    assert model.predict(1) == 0  # never negative
    assert model.largest(256) == 16


@pytest.mark.parametrize("peak", [math.nan, math.inf, 0, -1])
def test_a_peak_that_is_no_peak_is_skipped(peak):
    assert model_of({16: peak}).measured == []


def test_bad_arguments_are_refused():
    model = model_of({8: 100})
    bad: tuple[Any, ...] = (0, -3, math.nan, math.inf)
    for samples in bad:
        with pytest.raises(ValueError, match="at least 1 sample"):
            model.update(samples, 100)
    for samples in (0, -3, math.nan):
        with pytest.raises(ValueError, match="more than 0"):
            model.predict(samples)
    for budget in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            model.largest(budget)


def test_a_state_goes_through_a_weights_only_checkpoint_and_continues_alike():
    model = model_of({8: 180.5, 16: 260, 3: 130})
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = MemoryModel()
    other.load_state_dict(torch.load(file, weights_only=True))
    for samples in range(100, 132):  # forgets in the same order
        for each in (model, other):
            each.update(samples, 100 + 10 * samples)
            assert each.measured == model.measured
    assert other.state_dict() == model.state_dict()
    assert other.predict(1000) == model.predict(1000)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"peaks": 3},
        {"peaks": [], "more": 1},
        {"peaks": [[8, 100], [0, 100]]},
        {"peaks": [[8, 100], [True, 100]]},
        {"peaks": [[8, 100], [16, math.nan]]},
        {"peaks": [[8, 100], [16, "260"]]},
        {"peaks": [[8, 100], [16.0, 260]]},
        {"peaks": [[8, 100], [16]]},
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(state):
    model = model_of({8: 180, 16: 260})
    before = model.state_dict()
    with pytest.raises(ValueError, match="MemoryModel state"):
        model.load_state_dict(state)
    assert model.state_dict() == before


# --- Budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (123456, 123456),
        ("20GiB", 20 * GIB),
        ("20 GB", 20 * 10**9),
        ("512MiB", 512 * MIB),
        (" 1.5 gib ", 3 * GIB // 2),
        (".5TiB", 512 * GIB),
        ("100 kB", 100_000),
        ("64B", 64),
        (0.25, 2 * GIB),
        (1.0, 8 * GIB),
    ],
)
def test_a_budget_is_bytes_a_size_or_a_fraction_of_the_device(budget, expected):
    assert parse_budget(budget, 8 * GIB) == expected


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, -0.5, math.nan, math.inf, "0B", 1e-12])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match="memory_budget=") as error:
        parse_budget(budget, 8 * GIB)
    assert repr(budget) in str(error.value)


@pytest.mark.parametrize("budget", ["", "lots", "20", "20G", "GiB", "-1GiB", "1e3MB", "20 GiB free", "50%"])
def test_a_string_that_is_no_size_is_refused_with_an_example(budget):
    with pytest.raises(ValueError, match="20GiB"):
        parse_budget(budget, 8 * GIB)


@pytest.mark.parametrize("budget", [True, None, [1], b"1GiB"])
def test_a_budget_of_another_type_is_refused(budget):
    with pytest.raises(TypeError, match="memory_budget="):
        parse_budget(budget, 8 * GIB)


def test_a_fraction_needs_a_device_with_memory_of_its_own():
    assert parse_budget("2GiB", None) == 2 * GIB
    with pytest.raises(ValueError, match="no memory of its own"):
        parse_budget(0.5, None)


def test_the_cpu_has_no_budget_unless_the_user_sets_one():
    assert device_budget("cpu") is None
    assert device_memory("cpu") is None


def test_the_budget_of_a_gpu_is_all_that_can_be_allocated_less_a_margin(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    assert device_budget("cuda:0") == int(0.95 * 10 * GIB)
    assert device_memory("cuda:0") == 16 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    assert device_budget("cuda:0") == int(0.95 * 8 * GIB)
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")  # an older PyTorch
    assert device_budget("cuda:0") == int(0.95 * 10 * GIB)


def test_the_resident_size_of_this_process_holds_at_least_a_tensor_that_is_written():
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert resident_bytes() > held.nbytes


def test_freeing_memory_collects_what_only_cycles_hold():
    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself = cycle  # type: ignore[attr-defined]
    gone = weakref.ref(cycle)
    gc.disable()
    try:
        del cycle
        assert gone() is not None
        free_memory("cpu")
        assert gone() is None
    finally:
        gc.enable()


# --- Out of memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("whatever it says"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB total capacity)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCStorage.cu:58"),
        RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB"),
        RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1 GB)"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("In the TorchScript interpreter:\nRuntimeError: out of memory\nwhile running it"),
        RuntimeError("out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError(
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
        ),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1024"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:40]}",
)
def test_every_spelling_of_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


def test_the_error_of_this_machine_s_own_allocator_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        KeyError("out of memory"),
        RuntimeError("The replay buffer is out of memory slots"),
        RuntimeError("episode ran out of memory cells"),
        RuntimeError("DataLoader worker is killed: workers are out of shared memory."),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyboardInterrupt(),
        RuntimeError(),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:40]}",
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def chained(cause: BaseException | None, context: BaseException | None = None) -> Exception:
    error = ValueError("wrapped")
    error.__cause__, error.__context__ = cause, context
    return error


def test_an_error_raised_from_out_of_memory_counts_and_one_raised_beside_it_does_not():
    oom = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(chained(oom))
    assert is_out_of_memory(chained(chained(oom)))
    assert not is_out_of_memory(chained(None, context=oom))


def test_errors_that_cause_each_other_end():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


# --- Bytes saved for backward -----------------------------------------------------------------------------


class Attention(nn.Module):
    """One transformer block over tokens: views of one projection, soft-max, residuals, a token-mean head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head = nn.Linear(16, 50)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.head(x + self.mlp(x))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 32),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(32, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 5),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.SiLU(inplace=True),
        nn.Dropout2d(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def vectors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 12), torch.arange(n) % 5


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 14, 14), torch.arange(n) % 5


def tokens(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(50, (n, 9)), torch.randint(50, (n, 9))


PROBLEMS = {"mlp": (mlp, vectors), "cnn": (cnn, images), "transformer": (Attention, tokens)}
problems = pytest.mark.parametrize(("make", "data"), PROBLEMS.values(), ids=PROBLEMS)


def loss_of(net: Callable[[Any], Any], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(net(x).flatten(0, -2), y.flatten())


def state_of(net: nn.Module) -> list[torch.Tensor]:
    return [*net.parameters(), *net.buffers()]


def measured(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    with measure_memory("cpu", state_of(net)) as m:
        loss_of(net, x, y).backward()
    return m.bytes


@problems
def test_a_fit_on_small_sizes_predicts_the_largest_to_the_byte(make, data):
    net = make()
    model = MemoryModel()
    for size in (2, 4, 8):
        model.update(size, measured(net, *data(size)))
    for size in (64, 257):
        true = measured(net, *data(size))
        assert model.predict(size) == true
        assert model.largest(true) == size
        assert model.largest(true - 1) == size - 1


@problems
def test_a_part_of_a_batch_takes_what_a_batch_of_its_size_takes(make, data):
    net = make()
    x, y = data(24)
    assert measured(net, x[5:13], y[5:13]) == measured(net, x[:8].clone(), y[:8].clone())


@problems
def test_measuring_changes_no_result_and_holds_nothing(make, data):
    def run(meter):
        torch.manual_seed(1)
        net = make()
        x, y = data(8)
        with meter(net):
            loss = loss_of(net, x, y)
            loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters()), *net.buffers()]

    plain = run(lambda net: saved_tensors_hooks(lambda t: t.detach(), lambda t: t))
    for meter in (lambda net: SavedBytes(state_of(net)), lambda net: SavedBytes()):
        assert all(torch.equal(a, b) for a, b in zip(plain, run(meter), strict=True))


def test_the_bytes_are_those_that_the_layers_keep():
    linear = nn.Linear(3, 4)
    x = torch.randn(8, 3)
    with SavedBytes(linear.parameters()) as m:
        linear(x).relu().sum().backward()
    assert m.bytes == x.nbytes + 8 * 4 * 4  # the input of the linear layer, the output of relu

    with SavedBytes() as all_of_it:
        linear(x.requires_grad_()).relu().sum().backward()
    assert all_of_it.bytes == m.bytes + linear.weight.nbytes


def test_a_dropout_mask_counts():
    x = torch.ones(100, requires_grad=True)
    with SavedBytes() as m:
        nn.functional.dropout(x, 0.5).sum().backward()
    assert m.bytes in (100, 400)  # a mask of bools, or of floats


def test_views_of_one_storage_count_once():
    x = torch.randn(10, 6, requires_grad=True)
    with SavedBytes() as m:
        h = x * 2
        (h[:, :3] * h[:, 3:] * h.view(6, 10)[:3, :1].sum()).sum().backward()
    first_product = 10 * 3 * 4
    assert m.bytes == h.nbytes + first_product + 4


def test_a_storage_counts_while_the_graph_holds_it_and_no_longer():
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes() as m:
        for _ in range(3):
            x.exp().sum().backward()
    assert m.bytes == 4000
    with SavedBytes() as m:
        kept = [x.exp() for _ in range(3)]
    assert m.bytes == 12_000 and len(kept) == 3


def test_the_meter_keeps_no_tensor_and_no_graph_alive():
    x = torch.randn(10, requires_grad=True)
    gc.disable()
    try:
        with SavedBytes() as m:
            y = x.exp()
            gone = weakref.ref(y)
            z = y.sum()
            del y
            assert gone() is None  # saved is a handle on its storage
            del z
        assert m.bytes == 40
    finally:
        gc.enable()


def test_a_graph_outlives_its_meter():
    x = torch.randn(10, requires_grad=True)
    with SavedBytes():
        loss = (x**3).sum()
    gc.collect()
    loss.backward()
    torch.testing.assert_close(x.grad, 3 * x.detach() ** 2, rtol=0, atol=0)


def test_second_derivatives_pass_through():
    x = torch.randn(10, requires_grad=True, dtype=torch.float64)
    with SavedBytes() as m:
        (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        first.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, 36 * x.detach() ** 3)
    assert m.bytes > x.nbytes


def test_a_tensor_modified_in_place_is_an_error_with_and_without_the_meter():
    def wrong():
        y = torch.ones(3, requires_grad=True).exp()
        y.add_(1).sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        wrong()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), SavedBytes():
        wrong()


def test_an_error_in_the_block_takes_the_hooks_away():
    with pytest.raises(KeyError), SavedBytes():
        raise KeyError
    x = torch.randn(3, requires_grad=True)
    with SavedBytes() as m:
        x.exp()
    x.exp().sum().backward()
    assert m.bytes == 12


def test_a_block_inside_another_counts_for_both():
    x = torch.randn(10, requires_grad=True)
    with SavedBytes() as outer:
        first = x.exp()
        with SavedBytes() as inner:
            second = first.exp()
        third = second.exp()
    assert (outer.bytes, inner.bytes) == (120, 40)
    third.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_takes_less_and_trains_alike(reentrant):
    def run(forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(4))
        x = torch.randn(16, 8, requires_grad=True)
        with SavedBytes(layers.parameters()) as m:
            h = x
            for layer in layers:
                h = forward(layer, h)
            h.pow(2).sum().backward()
        return m.bytes, [p.grad for p in layers.parameters()]

    whole, expected = run(lambda layer, h: layer(h))
    less, grads = run(lambda layer, h: checkpoint(layer, h, use_reentrant=reentrant))
    assert 0 < less < whole / 2
    assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))


def test_hooks_of_the_user_s_own_inside_the_block_are_obeyed_and_theirs_is_not_counted():
    x = torch.randn(10, requires_grad=True)
    with SavedBytes() as m:
        y = x.exp()
        with save_on_cpu():
            z = y.exp()
        z.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp() * x.detach().exp().exp())
    assert m.bytes == 40


def test_hooks_of_the_user_s_own_around_the_block_stay_in_force():
    packed = []

    def pack(tensor):
        packed.append(tensor.nbytes)
        return tensor.detach()

    x = torch.randn(10, requires_grad=True)
    with saved_tensors_hooks(pack, lambda t: t), SavedBytes() as outer, SavedBytes() as inner:
        x.exp().sum().backward()
    assert packed == [40]
    assert outer.bytes == inner.bytes == 0
    assert model_of({10: outer.bytes}).measured == []  # taken as unknown, not as free


def test_where_hooks_are_forbidden_nothing_is_measured_and_nothing_breaks():
    x = torch.randn(10, requires_grad=True)
    with disable_saved_tensors_hooks("not here"), SavedBytes() as m:
        x.exp().sum().backward()
    assert m.bytes == 0 and x.grad is not None


def test_torch_func_refuses_hooks_and_the_refusal_can_be_told_from_other_errors():
    def gradient():
        return torch.func.grad(lambda w: (w * w).sum())(torch.ones(3))

    with pytest.raises(RuntimeError) as error, SavedBytes():
        gradient()
    assert is_hook_refusal(error.value)
    assert not is_hook_refusal(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert torch.equal(gradient(), 2 * torch.ones(3))


def test_sparse_and_nested_tensors_count_with_their_parts():
    dense = torch.randn(3, 4, requires_grad=True)
    sparse = torch.eye(3).to_sparse_coo()
    with SavedBytes() as m:
        torch.sparse.mm(sparse, dense).sum().backward()
    assert m.bytes == sparse._indices().nbytes + sparse._values().nbytes

    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(5, 4)], layout=torch.jagged, requires_grad=True)
    with SavedBytes() as m:
        nested.exp().values().sum().backward()
    assert m.bytes >= 7 * 4 * 4


def test_lazy_parameters_are_left_out_from_the_pass_after_they_are_made():
    net = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
    for _ in range(2):
        with SavedBytes(net.parameters()) as m:
            net(torch.randn(8, 3, requires_grad=True)).sum().backward()
    assert m.bytes == 8 * 3 * 4 + 8 * 4 * 4


def test_only_tensors_of_the_device_s_type_count():
    x = torch.randn(10, requires_grad=True)
    with SavedBytes(device="meta") as m:
        x.exp()
    assert m.bytes == 0


def test_autocast_is_measured_too():
    net = mlp()

    def low_precision(n):
        with torch.autocast("cpu", dtype=torch.bfloat16), measure_memory("cpu", state_of(net)) as m:
            loss_of(net, *vectors(n)).backward()
        return m.bytes

    model = model_of({n: low_precision(n) for n in (2, 4, 8)})
    assert model.predict(100) == low_precision(100)


def test_a_compiled_model_is_measured_without_compiling_again():
    net = mlp()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend)
    sizes = []
    for _ in range(2):
        loss_of(compiled, *vectors(8)).backward()
        with SavedBytes(net.parameters()) as m:
            loss_of(compiled, *vectors(8)).backward()
        sizes.append(m.bytes)
    assert sizes == [measured(net, *vectors(8))] * 2
    assert len(compilations) == 1


# --- Peaks of the allocator -------------------------------------------------------------------------------


class FakeAllocator:
    """The part of CUDA's allocator that PeakMemory reads."""

    def __init__(self, monkeypatch) -> None:
        self.current = self.peak = 0
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", self.statistics)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def statistics(self, device):
        return {"allocated_bytes": {"all": {"current": self.current, "peak": self.peak}}}

    def reset(self, device):
        self.peak = self.current

    def use(self, extra: int) -> None:
        """Allocates and frees."""
        self.peak = max(self.peak, self.current + extra)


def test_a_peak_is_that_of_the_block(monkeypatch):
    allocator = FakeAllocator(monkeypatch)
    allocator.current = 100
    allocator.use(1000)
    with PeakMemory("cuda:0") as m:
        allocator.use(50)
    assert (m.before, m.bytes) == (100, 150)
    assert isinstance(measure_memory("cuda:0"), PeakMemory)


def test_the_peak_of_an_outer_block_survives_the_reset_of_an_inner_one(monkeypatch):
    allocator = FakeAllocator(monkeypatch)
    allocator.current = 100
    with PeakMemory("cuda:0") as outer:
        allocator.use(70)
        with PeakMemory("cuda:0") as inner:
            allocator.use(50)
    assert (outer.bytes, inner.bytes) == (170, 150)
    with pytest.raises(KeyError), PeakMemory("cuda:0"):
        raise KeyError
    with PeakMemory("cuda:0") as outer, PeakMemory("cuda:0") as inner:
        allocator.use(80)
    allocator.use(1000)
    with PeakMemory("cuda:0"):
        pass
    assert (outer.bytes, inner.bytes) == (180, 180)  # what comes later is not theirs


# --- On a GPU ---------------------------------------------------------------------------------------------


def convolutions() -> nn.Module:
    blocks = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


@pytest.fixture
def small_gpu():
    """The GPU as if it had 3 GiB more than is in use now, without cuDNN's size-dependent searches."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.init()
    free_memory(device)
    total = torch.cuda.mem_get_info(device)[1]
    fraction = min(1.0, (torch.cuda.memory_reserved(device) + 3 * GIB) / total)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield device
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        free_memory(device)


def pass_on(device: torch.device, net: nn.Module, sample_shape: tuple[int, ...], n: int) -> int:
    """Peak of one forward/backward pass over n samples; raises when they do not fit."""
    net.zero_grad(set_to_none=True)
    with measure_memory(device) as m:
        net(torch.randn(n, *sample_shape, device=device)).pow(2).mean().backward()
    return m.bytes


def fits(device: torch.device, net: nn.Module, sample_shape: tuple[int, ...], n: int) -> bool:
    failed = False
    try:
        pass_on(device, net, sample_shape, n)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    free_memory(device)  # not inside `except`, where the traceback holds the activations
    return not failed


GPU_PROBLEMS = {"cnn": (convolutions, (3, 32, 32)), "transformer": (encoder, (64, 128))}


@pytest.mark.cuda
@pytest.mark.parametrize(("make", "sample_shape"), GPU_PROBLEMS.values(), ids=GPU_PROBLEMS)
def test_cuda_the_largest_size_is_predicted_within_five_per_cent(small_gpu, make, sample_shape, record_property):
    net = make().to(small_gpu)
    pass_on(small_gpu, net, sample_shape, 1)  # workspaces and handles that stay
    model = MemoryModel()
    proposed, size = 8, 0
    while proposed > 1.02 * size:  # as a run grows: never to more than twice what was measured
        size = proposed
        model.update(size, pass_on(small_gpu, net, sample_shape, size))  # fails if a proposal does not fit
        free_memory(small_gpu)
        proposed = min(2 * size, model.largest(device_budget(small_gpu) or 0))
    predicted = model.largest((device_budget(small_gpu) or 0) / 0.95)  # without the margin: the truth has none

    low, high = size, 2 * predicted
    assert not fits(small_gpu, net, sample_shape, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(small_gpu, net, sample_shape, middle) else (low, middle)
    record_property("predicted", predicted)
    record_property("true", low)
    assert predicted == pytest.approx(low, rel=0.05)


@pytest.mark.cuda
def test_cuda_a_peak_counts_what_was_freed_again_and_what_was_there_before():
    device = torch.device("cuda", torch.cuda.current_device())
    kept = torch.empty(4 * MIB, dtype=torch.uint8, device=device)
    with PeakMemory(device) as m:
        torch.empty(16 * MIB, dtype=torch.uint8, device=device)
    assert m.before >= kept.nbytes
    assert m.bytes - m.before == 16 * MIB


@pytest.mark.cuda
def test_cuda_the_budget_follows_the_process_fraction_and_not_what_is_cached(small_gpu):
    total = torch.cuda.mem_get_info(small_gpu)[1]
    fraction = torch.cuda.get_per_process_memory_fraction(small_gpu)
    budget = device_budget(small_gpu)
    assert budget == pytest.approx(0.95 * fraction * total, rel=0.01)
    torch.empty(256 * MIB, dtype=torch.uint8, device=small_gpu)  # stays in the allocator's cache
    assert device_budget(small_gpu) == pytest.approx(budget, rel=0.01)


@pytest.mark.cuda
def test_cuda_a_true_out_of_memory_is_recognised_and_freed(small_gpu):
    before = torch.cuda.memory_reserved(small_gpu)
    with pytest.raises(RuntimeError) as error:
        torch.empty(8 * GIB, dtype=torch.uint8, device=small_gpu)
    assert is_out_of_memory(error.value)
    torch.empty(512 * MIB, dtype=torch.uint8, device=small_gpu)
    free_memory(small_gpu)
    assert torch.cuda.memory_reserved(small_gpu) <= before + 2 * MIB
