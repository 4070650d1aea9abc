"""The model of steps on many processes sends what steps were seen to send."""

from __future__ import annotations

import pytest

from benchmarks.distributed.model import GPU, Layer, Network, Steps, efficiency, enough, inversions, network_of, sent
from benchmarks.record_page import load
from imstep.tasks import get_task


@pytest.mark.parametrize("task", ["digits-autoencoder", "digits-cnn"])
def test_sums_and_bytes_are_those_that_were_counted(task: str) -> None:
    counted, problem = load("distributed")["runs"][f"{task}; 2"], get_task(task).build(seed=0)
    network = network_of(task, problem.model, problem.train.inputs[:1])
    sums, numbers, exchanges = sent(network, Steps(*(counted[name] for name in ("products", "trials", "refreshes"))))
    assert sums == pytest.approx(counted["sums"])
    assert 4e-6 * numbers == pytest.approx(counted["MB in sums"])
    assert 2 * exchanges == pytest.approx(counted["exchanges"])


def test_efficiency_grows_with_the_batch() -> None:
    network = Network("", (Layer(301, 300), Layer(301, 10)), 93_310, tensors=4)
    examples = enough(network, 8, GPU, Steps())
    assert examples is not None
    assert efficiency(network, examples, 8, GPU, Steps()) >= 0.9 > efficiency(network, examples / 2, 8, GPU, Steps())
    assert inversions(network.factors, 2) < inversions(network.factors, 1)
