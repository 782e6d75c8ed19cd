"""Methods that change networks and do not fit: one clear line, before anything changes."""

import copy

import pytest
import torch
from torch import nn

from perennial.plasticity import attach, find_units, make, rewrite
from perennial.plasticity.architecture import rewriters
from tests.test_plasticity_architecture import ALL, mlp


def refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_odd_widths_are_refused_before_anything_changes():
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 15), nn.ReLU())
    before = copy.deepcopy(net)
    refused("crelu halves .* 15 is odd; take 16, or crelu:width=keep", rewrite, net, "crelu")
    assert [type(m) for m in net] == [type(m) for m in before]
    assert net[0].out_features == 16
    refused("fourier halves", rewrite, net, "fourier")
    refused("something outside", rewrite, net, "crelu:width=keep")


def test_clashes_are_refused():
    refused("both set the nonlinearity", rewrite, mlp(), ["crelu", "fourier"])
    refused("both normalise every layer", rewrite, mlp(), ["nap", "layer-norm"])
    refused("simba brings its own layers; leave crelu", rewrite, mlp(), ["simba", "crelu"])
    refused("applied to this network already", rewrite, rewrite(mlp(), "crelu"), "crelu")
    refused("both set the nonlinearity", rewrite, rewrite(mlp(), "crelu"), "fourier")
    refused("no nn.Sequential", rewrite, nn.Linear(3, 3), "layer-norm")
    refused("no nn.Sequential", rewrite, nn.Sequential(nn.Linear(3, 3)), "layer-norm")


def test_networks_that_do_not_fit():
    uneven = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
    refused("simba has one width, and the hidden layers have 16, 8", rewrite, uneven, "simba")
    normed = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    refused("a layer that has a norm", rewrite, normed, "crelu")
    refused("norms without memory", rewrite, normed, "nap")
    refused("holds a BatchNorm1d", rewrite, normed, "simba")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 3))
    refused("grouped convolutions", rewrite, grouped, "crelu")
    refused("passes a scale on .* not Tanh", rewrite, mlp(activation=nn.Tanh), "nap:gains=project")


@pytest.mark.parametrize("method", ALL)
def test_networks_that_were_not_rewritten_are_refused(method):
    net = mlp()
    units = find_units(net, torch.zeros(1, 5))
    optimizer = torch.optim.Adam(net.parameters())
    name = method.partition(":")[0]
    refused(f"call rewrite\\(model, '{name}'\\) before", attach, method, units, optimizer)


def test_an_existing_norm_is_kept():
    net = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
    norm = net[1]
    rewrite(net, "layer-norm")
    assert len(net) == 4 and net[1] is norm


def test_order_does_not_depend_on_the_list():
    for specs in (["layer-norm", "crelu"], ["crelu", "layer-norm"]):
        assert [m.name for m in rewriters(specs)] == ["crelu", "layer-norm"]
    assert rewriters("cbp") == [] and rewriters(make("nap"))[0].name == "nap"
