"""Splitting batches: every structure, views only, and refusals that name the entry."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import types
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaptive_batch.micro_batching import balanced_sizes, register_splitter, split_batch

SIZES = [2, 1, 2]
N = 5
STARTS = [0, 2, 3]


def rows(*shape: int) -> Tensor:
    return torch.arange(N * int(np.prod(shape)), dtype=torch.float32).reshape(N, *shape)


def is_part(part: Any, whole: Any, index: int) -> bool:
    """Whether ``part`` is a view of the samples of part ``index`` of ``whole``."""
    start, size = STARTS[index], SIZES[index]
    expected = whole[start : start + size]
    if isinstance(whole, Tensor):
        same = part.data_ptr() == expected.data_ptr() and torch.equal(part, expected)
        return same and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return np.shares_memory(part, whole) and np.array_equal(part, expected)


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any
    name: str = "frozen"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    y: Any


@dataclasses.dataclass
class Checked:
    x: Any
    y: Any
    checks: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.checks += 1


class Encoding(collections.UserDict):
    """As of the tokenizers that people use: a ``UserDict`` with attributes of its own."""

    def __init__(self, data: dict[str, Any], encodings: Any = None) -> None:
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Wrapped(MutableMapping):
    """A mapping that is neither a ``dict`` nor a ``UserDict``, and that copies shallowly by default."""

    def __init__(self, **entries: Any) -> None:
        self.store = entries
        self.extra = "kept"

    def __getitem__(self, key: str) -> Any:
        return self.store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.store[key] = value

    def __delitem__(self, key: str) -> None:
        del self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


class DictWithAttributes(dict):
    tag = "class"


class TensorDictLike:
    """Indexable along a batch dimension that it names itself."""

    def __init__(self, x: Tensor, batch_size: torch.Size) -> None:
        self.x, self.batch_size = x, batch_size

    def __getitem__(self, index: slice) -> TensorDictLike:
        x = self.x[index]
        return TensorDictLike(x, x.shape[:1])


class Opaque:
    pass


class Colour(enum.Enum):
    RED = 1


@pytest.fixture(autouse=True)
def _forget_splitters(monkeypatch):
    """What a test registers is registered for that test."""
    import functools

    from adaptive_batch import micro_batching

    monkeypatch.setattr(micro_batching, "_splitters", functools.singledispatch(micro_batching._unknown))


class TestSizes:
    @given(n=st.integers(1, 5000), largest=st.integers(1, 5000))
    def test_are_the_fewest_and_as_equal_as_possible(self, n, largest):
        sizes = balanced_sizes(n, largest)
        assert sum(sizes) == n
        assert max(sizes) <= largest
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == -(-n // largest)

    @given(n=st.integers(1, 500), largest=st.integers(1, 50), smallest=st.integers(1, 5))
    def test_keep_a_least_size_as_far_as_there_are_so_many(self, n, largest, smallest):
        sizes = balanced_sizes(n, largest, smallest)
        assert sum(sizes) == n
        assert min(sizes) >= min(smallest, n)
        assert max(sizes) <= max(largest, 2 * smallest - 1)

    @pytest.mark.parametrize(("n", "largest"), [(0, 4), (4, 0), (-1, 3), (3, -1)])
    def test_of_nothing_are_refused(self, n, largest):
        with pytest.raises(ValueError, match="must be positive"):
            balanced_sizes(n, largest)

    @pytest.mark.parametrize("sizes", [[], [5, 0], [3, 3], [6, -1]])
    def test_that_do_not_sum_to_the_batch_are_refused(self, sizes):
        with pytest.raises(ValueError, match="sum to n=5"):
            split_batch(rows(2), sizes, N)


class TestStructures:
    @pytest.mark.parametrize(
        "whole",
        [
            rows(3),
            rows(2, 2).half(),
            rows(4)[:, ::2],
            rows(3).requires_grad_(),
            np.arange(15).reshape(5, 3),
            np.array(["a", "b", "c", "d", "e"]),
            np.ma.masked_equal(np.arange(5), 3),
        ],
    )
    def test_tensors_and_arrays_are_sliced_as_views(self, whole):
        parts = split_batch(whole, SIZES, N)
        assert all(is_part(part, whole, i) for i, part in enumerate(parts))
        assert {type(part) for part in parts} == {type(whole)}

    @pytest.mark.parametrize(
        "make",
        [
            lambda x, y: (x, y),
            lambda x, y: [x, y],
            lambda x, y: Pair(x, y),
            lambda x, y: collections.UserList([x, y]),
            lambda x, y: collections.deque([x, y]),
        ],
    )
    def test_sequences_are_rebuilt_with_their_type(self, make):
        x, y = rows(3), np.arange(N)
        parts = split_batch(make(x, y), SIZES, N)
        assert {type(part) for part in parts} == {type(make(x, y))}
        for i, part in enumerate(parts):
            assert len(part) == 2
            assert is_part(part[0], x, i)
            assert is_part(part[1], y, i)

    @pytest.mark.parametrize(
        "make",
        [
            dict,
            collections.OrderedDict,
            DictWithAttributes,
            lambda entries: collections.defaultdict(list, entries),
            collections.UserDict,
            Encoding,
            lambda entries: Wrapped(**entries),
        ],
    )
    def test_mappings_are_rebuilt_with_their_type(self, make):
        x, y = rows(3), rows(1)
        whole = make({"x": x, "y": y, "name": "batch", "scale": 0.5})
        parts = split_batch(whole, SIZES, N)
        assert {type(part) for part in parts} == {type(whole)}
        for i, part in enumerate(parts):
            assert list(part) == ["x", "y", "name", "scale"]
            assert is_part(part["x"], x, i)
            assert is_part(part["y"], y, i)
            assert (part["name"], part["scale"]) == ("batch", 0.5)
        assert whole["x"] is x  # the batch itself is as it was
        assert list(whole) == ["x", "y", "name", "scale"]

    def test_what_a_mapping_carries_stays_with_it(self):
        encoding = Encoding({"input_ids": rows(3)}, encodings=["fast"])
        marked = DictWithAttributes(x=rows(2))
        marked.tag = "mine"
        default: collections.defaultdict[str, Any] = collections.defaultdict(int, x=rows(2))
        for i, part in enumerate(split_batch((encoding, marked, default, Wrapped(x=rows(2))), SIZES, N)):
            assert part[0]._encodings == ["fast"]
            assert is_part(part[0].input_ids, encoding["input_ids"], i)
            assert part[1].tag == "mine"
            assert part[2]["nothing"] == 0
            assert part[3].extra == "kept"

    @pytest.mark.parametrize("kind", [Frozen, Slotted, Checked])
    def test_dataclasses_are_rebuilt_without_initialising_them_again(self, kind):
        whole = kind(rows(3), [rows(1), None])
        for i, part in enumerate(split_batch(whole, SIZES, N)):
            assert type(part) is kind
            assert is_part(part.x, whole.x, i)
            assert is_part(part.y[0], whole.y[0], i)
            assert getattr(part, "checks", 1) == 1
        assert len(whole.x) == N

    def test_what_names_its_batch_dimension_is_indexed_along_it(self):
        x = rows(3)
        for i, part in enumerate(split_batch({"td": TensorDictLike(x, torch.Size([N]))}, SIZES, N)):
            assert is_part(part["td"].x, x, i)
            assert part["td"].batch_size == torch.Size([SIZES[i]])

    @pytest.mark.parametrize(
        "entries",
        [
            list("abcde"),
            tuple("abcde"),
            [1, 2, 3, 4, 5],
            [None] * 5,
            [Opaque() for _ in range(5)],
            [torch.zeros(3, k) for k in range(1, 6)],
            [{"boxes": torch.zeros(k, 4), "labels": torch.zeros(k)} for k in range(1, 6)],
            collections.deque([3, 1, 4, 1, 5]),
            collections.UserList("abcde"),
            [torch.tensor(1.0)] * 5,
            [[], [], [], [], []],
        ],
    )
    def test_a_sequence_of_one_entry_per_sample_is_sliced(self, entries):
        parts = split_batch({"x": rows(2), "entries": entries}, SIZES, N)
        for part, start, size in zip(parts, STARTS, SIZES, strict=True):
            assert type(part["entries"]) is type(entries)
            assert len(part["entries"]) == size
            for one, other in zip(part["entries"], list(entries)[start : start + size], strict=True):
                assert one is other

    @pytest.mark.parametrize(
        "shared",
        ["text", b"bytes", None, 3, 0.5, 1j, True, Colour.RED, torch.tensor(2.0), np.array(3), np.float32(4),
         np.int64(5), torch.float16, torch.device("cpu"), [], (), {}],
    )  # fmt: skip
    def test_what_has_no_samples_goes_to_every_part(self, shared):
        for part in split_batch([rows(2), shared], SIZES, N):
            assert part[1] is shared

    def test_nesting_has_no_limit(self):
        x = rows(2)
        whole: Any = x
        for depth in range(60):
            whole = {"deep": whole, "depth": depth} if depth % 2 else (whole, None)
        for i, part in enumerate(split_batch(whole, SIZES, N)):
            for depth in reversed(range(60)):
                part = part["deep"] if depth % 2 else part[0]
            assert is_part(part, x, i)

    def test_one_part_is_the_whole_batch(self):
        x = rows(2)
        (part,) = split_batch([x, None], [N], N)
        assert torch.equal(part[0], x)

    def test_detection_images_and_targets(self):
        images = [torch.zeros(3, 8 + i, 9) for i in range(N)]
        targets = tuple({"boxes": torch.zeros(i + 1, 4)} for i in range(N))
        parts = split_batch((images, targets), SIZES, N)
        assert [len(part[0]) for part in parts] == [len(part[1]) for part in parts] == SIZES
        assert parts[1][0][0] is images[2]
        assert parts[2][1][1] is targets[4]

    @given(st.data())
    def test_concatenated_parts_are_the_batch(self, data):
        n = data.draw(st.integers(1, 12))
        sizes = balanced_sizes(n, data.draw(st.integers(1, n)))
        x, y = torch.randn(n, 2), np.arange(n)
        parts = split_batch({"x": x, "more": [y, "shared"]}, sizes, n)
        assert torch.equal(torch.cat([part["x"] for part in parts]), x)
        assert np.array_equal(np.concatenate([part["more"][0] for part in parts]), y)
        assert [len(part["x"]) for part in parts] == sizes


class TestAmbiguity:
    """``n`` entries in a batch of ``n`` samples can be samples or not."""

    @pytest.mark.parametrize("shape", [(1,), (3,)])
    def test_input_and_target_of_two_samples_are_no_samples(self, shape):
        x, y = torch.zeros(2, 3), torch.ones(2, *shape)
        first, second = split_batch([x, y], [1, 1], 2)
        assert torch.equal(first[1], y[:1])
        assert torch.equal(second[0], x[1:])

    def test_entries_that_differ_inside_a_batch_are_no_samples(self):
        first, _ = split_batch({"inputs": [torch.zeros(2, 3), torch.zeros(2)], "n": 2}, [1, 1], 2)
        assert [len(column) for column in first["inputs"]] == [1, 1]

    @pytest.mark.parametrize(
        "entry", [[["cat", "dog"], []], [torch.ones(2, 1), None], [{"a": torch.ones(2)}, {"a": torch.ones(2), "b": 1}]]
    )
    def test_samples_that_lack_what_others_have_are_no_columns(self, entry):
        with pytest.raises(ValueError, match=r"^batch\['x'\] has 2 entries that are alike"):
            split_batch({"x": entry, "y": torch.zeros(2)}, [1, 1], 2)
        three = split_batch({"x": [*entry, entry[0]], "y": torch.zeros(3)}, [2, 1], 3)
        assert three[0]["x"][1] is entry[1] and three[1]["x"][0] is entry[0]

    @pytest.mark.parametrize(
        "batch",
        [
            ([torch.zeros(3, 8, 8)] * 3, [{"boxes": torch.zeros(7, 4)}] * 3),  # RGB images, three of them
            [(torch.zeros(3, 8, 8), label) for label in range(3)],
            {"views": [torch.zeros(3, 5)] * 3},
        ],
    )
    def test_entries_that_are_alike_are_refused(self, batch):
        with pytest.raises(ValueError, match=r"^batch.* has 3 entries that are alike"):
            split_batch(batch, [2, 1], 3)

    def test_named_tuples_are_never_samples(self):
        first, _ = split_batch(Pair(torch.zeros(2, 4), torch.ones(2, 4)), [1, 1], 2)
        assert first.x.shape == (1, 4)
        with pytest.raises(ValueError, match=r"batch is a sequence of 2"):
            split_batch(Pair("a", "b"), [1, 1], 2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("batch", "path"),
        [
            ([rows(2), torch.zeros(7, N)], r"batch\[1\] has first dimension 7"),  # sequence first
            ({"x": rows(2), "weights": torch.ones(10)}, r"batch\['weights'\] has first dimension 10"),
            (Frozen(rows(2), (1, 2, 3)), r"batch\.y is a sequence of 3"),
            ({"a": [{"b": torch.zeros(4)}]}, r"batch\['a'\]\[0\]\['b'\] has first dimension 4"),
            ([rows(2), torch.zeros(N, 3).to_sparse()], r"batch\[1\] is a nested or sparse tensor"),
            ([rows(2), Opaque()], r"batch\[1\] of type Opaque .* register_splitter\(Opaque, fn\)"),
            ([rows(2), {1, 2}], r"batch\[1\] of type set"),
            ([rows(2), Frozen], r"batch\[1\] of type type"),
            (types.MappingProxyType({"x": rows(2)}), r"batch of type mappingproxy cannot be rebuilt"),
            ([rows(2), TensorDictLike(rows(1), torch.Size([4]))], r"batch\[1\] has first dimension 4"),
            ({"x": rows(2), "size": (224, 224)}, r"batch\['size'\] is a sequence of 2"),
            ([rows(2), range(5)], r"batch\[1\] of type range cannot be rebuilt"),
        ],
    )  # fmt: skip
    def test_name_the_entry(self, batch, path):
        with pytest.raises(ValueError, match=path):
            split_batch(batch, SIZES, N)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_nested_tensors(self, layout):
        nested = torch.nested.nested_tensor([torch.zeros(k) for k in range(1, 6)], layout=layout)
        with pytest.raises(ValueError, match=r"batch\[1\] is a nested or sparse tensor"):
            split_batch([rows(2), nested], SIZES, N)

    @pytest.mark.parametrize("batch", ["text", 3, torch.tensor(1.0), {}, {"a": 1}, [], None])
    def test_of_a_batch_without_samples(self, batch):
        with pytest.raises(ValueError, match="found nothing with 5 samples"):
            split_batch(batch, SIZES, N)

    def test_leave_a_mapping_as_it_was_whose_copies_share_their_entries(self):
        class Hidden(Wrapped):
            """Its copies share the list that holds the entries."""

            def __init__(self, **entries: Any) -> None:
                self.table = [entries]

            @property
            def store(self) -> dict[str, Any]:  # type: ignore[override]
                return self.table[0]

        x = rows(2)
        whole = Hidden(x=x)
        with pytest.raises(ValueError, match="batch of type Hidden cannot be rebuilt"):
            split_batch(whole, SIZES, N)
        assert whole["x"] is x


class Ragged:
    def __init__(self, values: list[Tensor]) -> None:
        self.values = values

    @staticmethod
    def split(value: Ragged, sizes: Sequence[int]) -> list[Ragged]:
        stops = np.cumsum(sizes).tolist()
        return [Ragged(value.values[stop - size : stop]) for stop, size in zip(stops, sizes, strict=True)]


class NearerRagged(Ragged):
    pass


class TestRegisteredSplitters:
    def test_teach_a_type_and_its_subclasses(self):
        register_splitter(Ragged, Ragged.split)
        for kind in (Ragged, NearerRagged):
            parts = split_batch({"r": kind([torch.zeros(k) for k in range(N)])}, SIZES, N)
            assert [len(part["r"].values) for part in parts] == SIZES

    def test_the_nearest_registered_type_counts_whatever_the_order(self):
        register_splitter(NearerRagged, lambda value, sizes: ["near"] * len(sizes))
        register_splitter(Ragged, lambda value, sizes: ["far"] * len(sizes))
        assert split_batch(NearerRagged([]), SIZES, N) == ["near"] * 3
        assert split_batch(Ragged([]), SIZES, N) == ["far"] * 3

    def test_the_last_registration_of_a_type_counts(self):
        register_splitter(Ragged, lambda value, sizes: ["old"] * len(sizes))
        split_batch(Ragged([]), SIZES, N)
        register_splitter(Ragged, lambda value, sizes: ["new"] * len(sizes))
        assert split_batch(Ragged([]), SIZES, N) == ["new"] * 3

    def test_go_before_what_is_built_in(self):
        register_splitter(Encoding, lambda value, sizes: ["mine"] * len(sizes))
        assert split_batch([Encoding({"x": rows(2)}), rows(1)], SIZES, N)[0][0] == "mine"

    def test_abstract_types_count_for_what_implements_them(self):
        register_splitter(Mapping, lambda value, sizes: ["mapping"] * len(sizes))
        assert split_batch([{"a": torch.zeros(7)}, rows(1)], SIZES, N)[0][0] == "mapping"

    def test_a_wrong_number_of_parts_is_refused(self):
        register_splitter(Ragged, lambda value, sizes: ["only one"])
        with pytest.raises(ValueError, match=r"batch\[0\] of type Ragged returned 1 parts for 3 sizes"):
            split_batch([Ragged([]), rows(1)], SIZES, N)

    @pytest.mark.parametrize(("type_", "fn"), [("Ragged", len), (Ragged, "split"), (Ragged, None)])
    def test_arguments_are_checked(self, type_, fn):
        with pytest.raises(TypeError, match="register_splitter needs"):
            register_splitter(type_, fn)


def test_splitting_does_not_change_the_batch():
    batch = {"x": rows(2), "more": [np.arange(N), {"y": rows(1)}], "name": "n"}
    before = copy.deepcopy(batch)
    split_batch(batch, SIZES, N)
    assert str(batch) == str(before)
