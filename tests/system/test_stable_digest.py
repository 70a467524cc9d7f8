"""Values that compute differently have different digests; equal ones have one digest in every process."""

import functools
import importlib
import subprocess
import sys
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stride_captum.system.stable_digest import Examples, NoStableDigest, stable_digest

SCALE = 2.0
STORED = {0: [1.0, 2.0], 1: [1.0, 3.0]}
Point = namedtuple("Point", "x y")


def read_global():
    return SCALE


def call_helper():
    return helper()


def helper():
    return 1


def closure(value):
    return lambda: value


def decorated(function):
    @functools.wraps(function)
    def run():
        return function() + SCALE

    return run


def compiled(source, name, **namespace):
    exec(source, namespace)
    return namespace[name]


@dataclass
class Options:
    width: int = 3


class Net(nn.Module):
    def __init__(self, tag="a"):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.tag = tag
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x)


class OtherForward(Net):
    def forward(self, x):
        return self.layer(x).relu()


class Read(Dataset):
    """A data set whose examples are not among its attributes."""

    def __init__(self, which):
        self.which = which

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.tensor(STORED[self.which][i])


class Streamed(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


def hooked(run):
    net = Net()
    net.register_forward_hook(run)
    return net


def own_forward(run):
    net = Net()
    net.forward = run
    return net


def module_of_the_user(source):
    module = ModuleType("mine")
    exec(source, vars(module))
    return module


def reads_module(source):
    return compiled("def f(): return mine.sub(1)", "f", mine=module_of_the_user(source))


#: Pairs that compute differently.
OTHERS = {
    "numbers": (1, 2),
    "an integer and a float": (1, 1.0),
    "a number and a truth value": (1, True),
    "texts": ("a", "b"),
    "a text and bytes": ("a", b"a"),
    "texts that join to one": (["ab", "c"], ["a", "bc"]),
    "lists": ([1, [2]], [1, 2]),
    "a list and a tuple": ([1], (1,)),
    "sets": ({1, 2}, {1, 3}),
    "an order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "values of keys": ({"a": 1}, {"a": 2}),
    "named tuples": (Point(1, 2), Point(2, 1)),
    "data classes": (Options(), Options(width=4)),
    "tensors": (torch.zeros(2), torch.ones(2)),
    "shapes": (torch.zeros(2, 1), torch.zeros(1, 2)),
    "types of numbers": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "sparse tensors": (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
    "conjugates": (torch.tensor([1j]), torch.tensor([1j]).conj()),
    "arrays": (np.zeros(2), np.ones(2)),
    "arrays of objects": (np.array([1, "a"], dtype=object), np.array([1, "b"], dtype=object)),
    "numbers of numpy": (np.float32(0.1), np.float64(0.1)),
    "matrices of scipy": (sparse.identity(3, format="csr"), 2 * sparse.identity(3, format="csr")),
    "random states": (np.random.default_rng(0), np.random.default_rng(1)),
    "generators of torch": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "operations": (lambda x: x + 1, lambda x: x - 1),
    "constants of code": (lambda x: x + 1, lambda x: x + 2),
    "defaults": (lambda x=1: x, lambda x=2: x),
    "keyword defaults": (lambda *, x=1: x, lambda *, x=2: x),
    "closures": (closure(1), closure(torch.ones(1))),
    "functions within": (closure(closure(1)), closure(closure(2))),
    "attributes of functions": (decorated(helper), decorated(call_helper)),
    "partials": (functools.partial(helper, 1), functools.partial(helper, 2)),
    "keywords of partials": (functools.partial(helper, a=1), functools.partial(helper, a=2)),
    "globals": (compiled("def f(): return n", "f", n=1), compiled("def f(): return n", "f", n=2)),
    "functions that are called": (
        compiled("def g(): return 1\ndef f(): return g()", "f"),
        compiled("def g(): return 2\ndef f(): return g()", "f"),
    ),
    "modules of the user": (reads_module("def sub(x): return x"), reads_module("def sub(x): return -x")),
    "cached functions": (functools.cache(helper), functools.cache(call_helper)),
    "a wrapper of a function of torch": (torch.relu, functools.wraps(torch.relu)(lambda x: x)),
    "methods": (Options(1).__eq__, Options(2).__eq__),
    "forward passes": (Net, OtherForward),
    "networks of two classes": (Net(), OtherForward()),
    "attributes of networks": (Net(), Net(tag="b")),
    "weights": (Net(), Net().apply(lambda m: [p.data.add_(1) for p in m.parameters()])),
    "hooks": (hooked(lambda *a: None), hooked(lambda *a: a[2] * 2)),
    "forward passes of an object": (own_forward(torch.relu), own_forward(torch.sigmoid)),
    "an order of layers": (
        nn.Sequential(OrderedDict(a=nn.ReLU(), b=nn.Tanh())),
        nn.Sequential(OrderedDict(b=nn.Tanh(), a=nn.ReLU())),
    ),
    "buffers that are not saved": (nn.BatchNorm1d(2), nn.BatchNorm1d(2, eps=1e-3)),
    "data sets": (TensorDataset(torch.zeros(2)), TensorDataset(torch.ones(2))),
    "examples read from elsewhere": (Read(0), Read(1)),
    "streamed examples": (Streamed(2), Streamed(3)),
    "batches": (DataLoader(Streamed(4), batch_size=2), DataLoader(Streamed(4), batch_size=4)),
    "classes by a member": (type("A", (), {"n": 1}), type("A", (), {"n": 2})),
    "classes by a base": (type("A", (Options,), {}), type("A", (Net,), {})),
    "classes that claim to be built in": (
        compiled("class A:\n def f(self): return 1", "A"),
        compiled("class A:\n def f(self): return 2", "A"),
    ),
    "properties": (property(lambda s: 1), property(lambda s: 2)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_computes_differently_has_another_digest(what):
    one, other = OTHERS[what]
    assert stable_digest(one) != stable_digest(other)


@pytest.mark.slow  # torch.compile is slow to import
def test_compiled_networks_count_with_what_they_compile():
    assert stable_digest(torch.compile(Net())) != stable_digest(torch.compile(OtherForward()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_networks_count_with_their_graph_and_weights():
    scripted = [torch.jit.script(nn.Sequential(nn.Linear(2, 2), end)) for end in (nn.ReLU(), nn.Tanh())]
    scripted.append(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    assert len({stable_digest(network) for network in scripted}) == 3
    assert stable_digest(scripted[0]) == stable_digest(scripted[0])


EQUAL = {
    "tensors": (torch.arange(4.0), torch.arange(8.0)[::2] / 2),
    "sets": ({"a", "bb", "ccc"}, {"ccc", "bb", "a"}),
    "code in other lines": (compiled("\n\n\ndef f(x): return x", "f"), compiled("def f(x): return x", "f")),
    "networks": (Net(), Net()),
    "networks in another mode": (Net(), Net().eval()),
    "hooks with other numbers": (hooked(read_global), hooked(read_global)),
    "modules used for something else": (
        reads_module("def sub(x): return x"),
        reads_module("def sub(x): return x\ndef another(): return 3"),
    ),
    "sharing": ([(one := [1]), one], [[1], [1]]),
    "what is not read of a name": (
        compiled("def f(x): return x.n", "f", n=1),
        compiled("def f(x): return x.n", "f", n=2),
    ),
    "a data set and its examples": (Examples(Read(0)), Read(0)),
}


@pytest.mark.parametrize("what", EQUAL)
def test_equal_content_has_one_digest(what):
    one, other = EQUAL[what]
    assert stable_digest(one) == stable_digest(other)


def test_a_global_value_counts_as_it_is_now(monkeypatch):
    before = stable_digest(read_global)
    called = stable_digest(call_helper)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert stable_digest(read_global) != before
    monkeypatch.setitem(globals(), "helper", lambda: 2)
    assert stable_digest(call_helper) != called


def test_the_content_of_a_file_counts_not_its_name(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"1")
    before = stable_digest(one)
    assert stable_digest(other) == before
    one.write_bytes(b"2")
    assert stable_digest(one) != before
    assert stable_digest(tmp_path / "none") != stable_digest(tmp_path / "neither")


def test_a_module_that_is_imported_within_a_function_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "def f():\n    import imported_within\n    return imported_within.value()"
    digests = []
    for value in (1, 2):
        (tmp_path / "imported_within.py").write_text(f"def value(): return {value}\n" + "#" * value)
        monkeypatch.delitem(sys.modules, "imported_within", raising=False)
        importlib.invalidate_caches()
        digests.append(stable_digest(compiled(source, "f", __package__="")))
    assert len(set(digests)) == 2


def test_what_contains_itself_has_a_digest():
    one, other, third = [1], [1], [2]
    for value in (one, other, third):
        value.append(value)
    assert stable_digest(one) == stable_digest(other) != stable_digest(third)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"log": [threading.Lock()]}, r"`option\.log\[0\]` is of type lock"),
        (closure(threading.Lock()), r"`option\.value` is of type lock"),
        ((i for i in ()), r"`option` is of type generator"),
        (Examples(iter([1])), r"`option` is an iterator, which is spent by reading it"),
        (Examples(3), r"`option` is data without a length"),
        (torch.zeros(2, device="meta"), r"`option` is a tensor whose content cannot be read"),
        (ModuleType("nowhere"), r"`option` is the module 'nowhere', which has no file"),
    ],
)
def test_what_has_no_content_is_named(value, said):
    with pytest.raises(NoStableDigest, match=said):
        stable_digest(value, "option")


def test_an_open_file_has_no_digest(tmp_path):
    with (
        open(tmp_path / "log", "w") as file,
        pytest.raises(NoStableDigest, match=r"`build\.file` is of type TextIOWrapper, whose content"),
    ):
        stable_digest(lambda: file, "build")


def test_reading_examples_leaves_the_random_state_alone():
    class Noisy(Read):
        def __getitem__(self, i):
            return torch.randn(1)

    before = torch.get_rng_state()
    stable_digest(Noisy(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_code_of_a_package_counts_by_name_where_that_is_asked_for(monkeypatch):
    name = __name__.partition(".")[0]
    by_name = stable_digest(call_helper, packages=(name,))
    by_content = stable_digest(call_helper)
    monkeypatch.setitem(globals(), "helper", lambda: 2)
    assert stable_digest(call_helper, packages=(name,)) == by_name
    assert stable_digest(call_helper) != by_content


ELSEWHERE = """
import functools, numpy as np, torch
from torch import nn
from torch.utils.data import TensorDataset
from stride_captum.evaluation.tasks.networks import cifar10_cnn
from stride_captum.system.stable_digest import stable_digest

class Net(nn.Module):
    names = frozenset({"a", "bb", "ccc"})
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x):
        return self.layer(x) if x.ndim in {1, 2, 3} else {"p", "q"}
torch.manual_seed(0)
print(stable_digest([Net, Net(), functools.partial(Net), cifar10_cnn, np.random.default_rng(0), {"x", "y"}]))
"""


@pytest.mark.slow
def test_digests_are_those_of_another_process():
    found = {
        subprocess.run(
            [sys.executable, "-c", ELSEWHERE],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert len(found.pop()) == 65
