"""What Prometheus would read from a service."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import ServiceProcess

Labels = dict[str, str]


def scraped_text(service: ServiceProcess) -> str:
    """Return the whole page."""
    address = service.events("metrics_listener_started")[0]["address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as page:
        text: str = page.read().decode()
    return text


class Scrape:
    """One scrape, with every sample by its name and labels."""

    def __init__(self, service: ServiceProcess) -> None:
        self.samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(scraped_text(service))
            for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of this name that have these labels, 0 without any."""
        return sum(value for found, given, value in self.samples if found == name and labels.items() <= given.items())

    def values(self, label: str) -> set[str]:
        """Return every value that a label has anywhere."""
        return {labels[label] for _, labels, _ in self.samples if label in labels}
