"""Tenants as Prometheus reads them: how much each asks, and what is refused beyond which quota."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.cloud.tenants.roster import Roster


class TenantCollector(Collector):
    """Reads the server's own counts at each scrape. There are as many series as the operator made tenants."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def collect(self) -> Iterable[Metric]:
        """Yield the families of metrics."""
        calls, refused = self._roster.counted()
        asked = CounterMetricFamily(
            "isthmus_tenant_calls", "Calls, frames and images by tenant, refused ones included.", labels=["tenant"]
        )
        for tenant in {*self._roster.names(), *calls}:
            asked.add_metric([tenant], calls.get(tenant, 0))
        yield asked
        beyond = CounterMetricFamily(
            "isthmus_tenant_refused", "Refused beyond a quota, by tenant and quota.", labels=["tenant", "quota"]
        )
        for (tenant, quota), count in refused.items():
            beyond.add_metric([tenant, quota], count)
        yield beyond
