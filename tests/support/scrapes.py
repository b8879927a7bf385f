"""Scrapes the metrics of a service, as Prometheus does."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import ServiceProcess

Labels = dict[str, str]


def scraped_text(service: ServiceProcess) -> str:
    """Return the text of the metrics page."""
    address = service.events("metrics_listener_started")[0]["address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as page:
        text: str = page.read().decode()
    return text


class Scrape:
    """The samples of one scrape."""

    def __init__(self, service: ServiceProcess) -> None:
        self.samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(scraped_text(service))
            for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with this name and at least these labels; 0 without any."""
        return sum(value for found, given, value in self.samples if found == name and labels.items() <= given.items())

    def values(self, label: str) -> set[str]:
        """Return the distinct values of a label over all samples."""
        return {labels[label] for _, labels, _ in self.samples if label in labels}
