from __future__ import annotations

import threading
import warnings

import pytest
import torch
from small_nets import Net, hooks_on, names, net, noise, read
from torch import nn

from stride_captum.data.batch import ExampleBatch
from stride_captum.layers.activations import default_taps, named_taps, recording
from stride_captum.layers.hooks import check_weights_exist, watching
from stride_captum.layers.probes import check_deterministic

BATCH = noise(5, 6), torch.zeros(5)


def layers(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch call it deprecated
        return torch.jit.script(model)


def traced(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, BATCH[0])


class TestScriptedModels:
    @pytest.mark.parametrize("compiled", [scripted, traced])
    def test_as_a_whole(self, compiled):
        model = compiled(layers())
        with pytest.raises(
            ValueError,
            match=r"`model` must be one whose submodules take hooks; got .*Module, which `torch.jit` has "
            r"compiled. Pass the model before it was scripted or traced.",
        ):
            default_taps(model, BATCH, 4096)
        with pytest.raises(
            ValueError, match="must name submodules that take hooks; got '0', in a model that `to"
        ):
            named_taps(model, ["0"], BATCH)

    def test_as_a_part(self):
        model = net(
            lambda m, x: m.head(m.back(x)), back=lambda: scripted(layers()), head=lambda: nn.Linear(3, 2)
        )
        for name in ("back", "back.2"):
            with pytest.raises(
                ValueError,
                match=rf"`layers` must name submodules that take hooks; got '{name}', in a model that "
                r"`torch.jit` has compiled. Name what a layer behind it reads, or pass the model before",
            ):
                named_taps(model, [name], BATCH)
        with pytest.warns(
            UserWarning, match="leave out 92% of the weights of .* 'back.0.weight', 'back.2.weight'"
        ):
            taps = default_taps(model, BATCH, 4096)
        assert names(taps) == ["head:input"]
        torch.testing.assert_close(read(model, taps, BATCH)[1][0], model.back(BATCH[0]))


class TestCompiledModels:
    """Compiled code may not call the hooks that come after it."""

    @pytest.fixture(params=["whole", "in place", "part"])
    def model(self, request):
        inner = layers()
        if request.param == "whole":
            model = torch.compile(inner, backend="eager")
        elif request.param == "in place":
            model = inner
            model.compile(backend="eager")
        else:
            model = Net(lambda m, x: m.part(x), part=torch.compile(inner, backend="eager")).eval()
        with torch.no_grad():
            model(BATCH[0])
        return model

    @pytest.mark.slow
    def test_are_read_as_they_were_before(self, model):
        taps = default_taps(model, BATCH, 4096)
        outputs, rows = read(model, taps, BATCH)
        wanted, expected = read(layers(), default_taps(layers(), BATCH, 4096), BATCH)
        assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
        assert torch.equal(outputs, wanted)
        check_deterministic(model, BATCH)

    def test_take_the_names_from_before(self):
        model = torch.compile(layers(), backend="eager")
        torch.testing.assert_close(
            read(model, named_taps(model, ["1"], BATCH), BATCH)[1][0], layers()[:2](BATCH[0])
        )

    @pytest.mark.slow
    def test_an_older_torch(self, monkeypatch):
        model = torch.compile(layers(), backend="eager")
        monkeypatch.delattr(torch.compiler, "set_stance")
        with pytest.raises(
            TypeError,
            match=r"`model` must be uncompiled with this .*; got OptimizedModule. Pass its `._orig_mod`",
        ):
            default_taps(model, BATCH, 4096)


class TestWrappers:
    def test_copies_on_several_devices(self):
        model = nn.DataParallel(layers(), device_ids=[])
        assert names(default_taps(model, BATCH, 4096)) == ["module.0:input", "module.2:input"]
        model.device_ids = [0, 1]
        with pytest.raises(
            TypeError,
            match=r"`model` must run on one device; got DataParallel. Pass its `.module`: hooks would mix",
        ):
            default_taps(model, BATCH, 4096)


class TestOtherModels:
    def test_lazy_modules_have_no_weights_yet(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(nn.Linear(6, 4), nn.LazyLinear(3)).eval()
        for call in (
            lambda: default_taps(model, BATCH, 4096),
            lambda: named_taps(model, ["0"], BATCH),
            lambda: check_deterministic(model, BATCH),
        ):
            with pytest.raises(
                ValueError,
                match=r"`model` must be initialized; got a lazy module without weights, '1'. Run one batch",
            ):
                call()
        model(BATCH[0])
        check_weights_exist(model)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
    def test_dynamically_quantized_layers_are_weight_layers(self):
        model = torch.ao.quantization.quantize_dynamic(layers(), {nn.Linear}, torch.qint8)
        taps = default_taps(model, BATCH, 4096)
        assert names(taps) == ["0:input", "2:input"]
        rows = read(model, taps, BATCH)[1]
        torch.testing.assert_close(rows[1], model[:2](BATCH[0]))
        check_deterministic(model, BATCH)

    def test_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            model = layers()
        taps = default_taps(model, BATCH, 4096)
        assert names(taps) == ["0:input", "2:input"]
        torch.testing.assert_close(read(model, taps, BATCH)[1][1], layers()[:2](BATCH[0]))
        with torch.inference_mode():
            assert default_taps(model, BATCH, 4096) == taps


class TestWhatIsLeftBehind:
    @pytest.mark.parametrize("at", ["forward", "see", "register"])
    def test_no_hook_whatever_is_raised(self, at, monkeypatch):
        model = layers()

        def explode(*args):
            raise KeyboardInterrupt

        if at == "forward":
            model[1].forward = explode
        if at == "register":
            monkeypatch.setattr(model[2], "register_forward_hook", explode)
        places = [(name, side) for name in ("0", "1", "2") for side in (True, False)]
        with (
            pytest.raises(KeyboardInterrupt),
            watching(model, places, explode if at == "see" else print) as run,
        ):
            run(ExampleBatch.of(BATCH))
        assert hooks_on(model) == 0

    def test_what_another_thread_runs_is_not_seen(self):
        model = layers()
        taps = named_taps(model, ["0", "0:input"], BATCH)
        wanted = read(model, taps, BATCH)[1]
        with recording(model, taps) as run, torch.no_grad():
            model[1].register_forward_hook(self.in_another_thread(model))
            rows = run(BATCH)[1]
        assert all(torch.equal(a, b) for a, b in zip(rows, wanted, strict=True))

    @staticmethod
    def in_another_thread(model):
        busy = []

        def hook(*args):
            if not busy:
                busy.append(True)
                other = threading.Thread(target=lambda: model(noise(2, 6)))
                other.start()
                other.join()

        return hook

    def test_the_hooks_of_the_user_stay(self):
        model, seen = layers(), []
        model[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
        taps = named_taps(model, ["0", "0:input"], BATCH)
        with pytest.raises(RuntimeError), recording(model, taps) as run:
            run((noise(5, 7), None))
        assert hooks_on(model) == 1
        model(BATCH[0])
        assert seen[-1] == 5
