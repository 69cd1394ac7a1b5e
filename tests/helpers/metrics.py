"""What a scrape says."""

from prometheus_client.parser import text_string_to_metric_families

from cascade import metrics

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: bytes) -> Values:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def value(values: Values, name: str, **labels: str) -> float:
    return values.get((f"cascade_{name}", tuple(sorted(labels.items()))), 0.0)


def now(name: str, **labels: str) -> float:
    return value(parsed(metrics.scrape()), name, **labels)
