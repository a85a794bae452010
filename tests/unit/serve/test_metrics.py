from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from serve import metrics
from serve.errors import DureError, at_capacity


def process(predictions: int) -> list[object]:
    registry = CollectorRegistry()
    Counter("predictions", "p", ["model"], registry=registry).labels("m").inc(predictions)
    Histogram("seconds", "s", registry=registry, buckets=(0.1, 1)).observe(0.5)
    Gauge("queue", 'with "quotes" and \\ and\nlines', registry=registry).set(3)
    return list(registry.collect())


def test_one_exposition_of_many_processes_counts_each_once() -> None:
    text = metrics.exposition({("a", "r1"): process(2), ("a", "r2"): process(5)}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(families) == 3
    counted = {s.labels["replica"]: s.value for s in families["predictions"].samples}
    assert counted == {"r1": 2, "r2": 5}
    assert text.count("# TYPE predictions_total counter") == 1
    assert {s.labels["le"] for s in families["seconds"].samples if s.name.endswith("_bucket")} == {"0.1", "1.0", "+Inf"}


@pytest.mark.parametrize(
    ("error", "status"), [(None, "ok"), (at_capacity("m"), "refused"), (DureError(500, "x", "y"), "error")]
)
def test_predictions_are_counted_by_how_they_ended(error: DureError | None, status: str) -> None:
    def count() -> float:
        return metrics.REGISTRY.get_sample_value("predictions_total", {"model": "m", "status": status}) or 0

    before = count()
    try:
        with metrics.measured("m"):
            if error:
                raise error
    except DureError:
        pass
    assert count() == before + 1
