"""The benchmark of plasticity methods measures what it says."""

from __future__ import annotations

import pytest

from perennial.agents.bench_plasticity import LIMITS, _cost, _periods, _Update
from perennial.plasticity.registry import METHODS


def test_periods_are_those_that_a_measurement_may_miss() -> None:
    assert _periods("redo") == [1000] and _periods("cbp") == [] and _periods("weight-norm") == []
    assert len(_periods("snr")) == 2
    assert set(LIMITS) <= set(METHODS)


def test_late_updates_hold_the_events_whose_cost_is_measured() -> None:
    cbp = _Update(("cbp:rate=0.01,maturity=100",))
    cbp.seconds()
    assert cbp.agent.handle.counts()["cbp"] == 0  # no unit is mature yet
    cbp.at(1_000_000)
    cbp.seconds()
    assert cbp.agent.handle.counts()["cbp"] > 0
    ages = cbp._ages(cbp.agent.handle.interventions["cbp"])
    assert abs((ages > 100).double().mean().item() - 0.5) < 0.01  # half of a life of 100 + 1/0.01
    assert abs(ages[ages > 100].double().mean().item() - 200) < 5
    redo = _Update(("redo:threshold=2",))
    redo.at(1_000_000 - 17)
    redo.seconds()
    assert redo.agent.handle.counts()["redo"] == 0
    redo.at(1_000_000 - 15)
    redo.seconds()
    assert redo.agent.handle.counts()["redo"] > 0
    assert int(redo.agent.handle.clock.updates) == 1_000_001


def test_a_dear_change_of_the_network_costs_more_than_a_cheap_penalty() -> None:
    plain = _Update(())
    cheap, dear = (_cost(_Update((name,)), plain, [], 3) for name in ("l2", "simba"))
    assert sorted(cheap)[1] < 1 < sorted(dear)[1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_measured(name: str) -> None:
    update = _Update((name,))
    assert update.agent.handle.interventions.keys() <= {name}
