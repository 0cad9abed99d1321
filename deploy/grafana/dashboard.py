"""`python deploy/grafana/dashboard.py`: writes `limpid.json`, the Grafana dashboard. Change it here, then run it.

Every query of it is run by the tests against a real Prometheus that scrapes a real service.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as dashboard_models

OUTPUT = Path(__file__).with_name("limpid.json")
WHERE = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """A time series panel: title, what it tells an operator, Grafana's unit, and (query, legend) pairs.

    Its axis begins at zero unless it is `signed`.
    """

    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False
    signed: bool = False


def rate(series: str, labels: str = "") -> str:
    return f"rate(limpid_{series}{{{WHERE}{', ' + labels if labels else ''}}}[$__rate_interval])"


def quantile(q: float, series: str, by: str) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) ({rate(series + '_bucket')}))"


def gauge(series: str) -> str:
    return f"limpid_{series}{{{WHERE}}}"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Traffic": (
        Panel("Requests", "Answers per second by operation and status; 499 is a client that hung up.", "reqps",
              ((f"sum by (operation, status) ({rate('http_requests_total')})", "{{operation}} {{status}}"),), True),
        Panel("Rejections", "Refused requests by problem type. queue-full asks for more replicas.", "reqps",
              ((f"sum by (reason) ({rate('rejected_total')})", "{{reason}}"),), True),
        Panel("Clients that hung up", "By the phase that they left in.", "reqps",
              ((f"sum by (phase) ({rate('client_disconnects_total')})", "{{phase}}"),)),
        Panel("Pixels", "Photo pixels per second: compare with the sizing table.", "none",
              ((f"sum by (operation, model) ({rate('pixels_total')})", "{{operation}} {{model}}"),)),
    ),
    "Latency": (
        Panel("Latency", "Whole request, but for those refused with 429.", "s",
              tuple((quantile(q, "http_request_duration_seconds", "operation"), f"{{{{operation}}}} p{100 * q:g}")
                    for q in (0.5, 0.95, 0.99))),
        Panel("Stages, 95th percentile", "queue grows first when the device is the limit.", "s",
              ((quantile(0.95, "stage_duration_seconds", "operation, stage"), "{{operation}} {{stage}}"),)),
    ),
    "Batching": (
        Panel("Batch size", "Mean items per run on the device; grows with the load by itself.", "none",
              ((f"sum by (operation) ({rate('batch_size_sum')}) / sum by (operation) ({rate('batch_size_count')})",
                "{{operation}}"),)),
        Panel("Queue", "Items that wait for the device, requests in progress, and the most that may be.", "none",
              ((gauge("queue_items"), "waiting {{instance}}"),
               (f"sum by (instance) ({gauge('requests_in_progress')})", "in progress {{instance}}"),
               (gauge("admission_limit"), "limit {{instance}}"))),
        Panel("Seconds ahead", "In which what waits, and runs before it, will be done; 429 where a request has less.",
              "s", ((gauge("queue_seconds"), "{{instance}}"),)),
        Panel("Bytes", "Of photos and bitstreams that wait, of bodies and answers in progress, and the most of either.",
              "bytes", ((gauge("queue_bytes"), "waiting {{instance}}"),
                        (gauge("bytes_in_progress"), "in progress {{instance}}"),
                        (gauge("byte_limit"), "limit {{instance}}"))),
        Panel("Device", "Steps per second, and batches that the device has: some and no step is a device that hangs.",
              "none", ((f"sum by (instance) ({rate('device_steps_total')})", "steps {{instance}}"),
                       (gauge("batches_in_progress"), "batches {{instance}}"))),
        Panel("Batches halved", "A failed batch is halved until the bad item stands alone.", "reqps",
              ((f"sum by (reason) ({rate('batch_retries_total')})", "{{reason}}"),)),
    ),
    "Compression": (
        Panel("Bits per pixel", "Mean by rate point. A drift means that other photos come in.", "none",
              ((f"sum by (model, rate) ({rate('bits_per_pixel_sum')})"
                f" / sum by (model, rate) ({rate('bits_per_pixel_count')})", "{{model}} rate {{rate}}"),)),
        Panel("Bytes saved", "Uploads minus the bitstreams that they became.", "Bps",
              ((f"""sum({rate('image_bytes_total', 'operation="compress"')})"""
                f""" - sum({rate('bitstream_bytes_total', 'operation="compress"')})""", "saved"),
               (f"""sum({rate('image_bytes_total', 'operation="compress"')})""", "uploads"),
               (f"""sum({rate('bitstream_bytes_total', 'operation="compress"')})""", "bitstreams")), signed=True),
        Panel("Degradations", "What the encoder found wrong with the photos; a camera that fogs up shows.", "reqps",
              ((f"sum by (kind) ({rate('degradations_total')})", "{{kind}}"),), True),
        Panel("Efforts", "Photos by the effort asked for. With 4, one takes 13 times as long or more.", "reqps",
              ((f"sum by (effort) ({rate('efforts_total')})", "effort {{effort}}"),), True),
    ),
    "Process": (
        Panel("Ready", "1 when the instance answers requests.", "none", ((gauge("ready"), "{{instance}}"),)),
        Panel("Memory", "Resident memory and its limit.", "bytes",
              ((f"process_resident_memory_bytes{{{WHERE}}}", "resident {{instance}}"),
               (gauge("memory_limit_bytes"), "limit {{instance}}"))),
        Panel("Device memory", "What torch holds on a GPU; the resident memory of the process where there is none.",
              "bytes", ((f'{gauge("gpu_memory_bytes")} or on (instance) '
                         f'label_replace(process_resident_memory_bytes{{{WHERE}}}, "device", "cpu", "", "")',
                         "{{instance}} {{device}} {{kind}}"),)),
        Panel("Reloads of the store", "On SIGHUP, in the time shown; one that failed leaves the models as they were.",
              "none", ((f"sum by (instance, outcome) (increase(limpid_store_reloads_total{{{WHERE}}}[$__range]))",
                        "{{instance}} {{outcome}}"),)),
        Panel("Models", "On each instance.", "none",
              ((f"sum by (model, device) ({gauge('model_loaded')})", "{{model}} on {{device}}"),)),
    ),
}  # fmt: skip


def _panel(panel: Panel, source: dashboard_models.DataSourceRef, width: int) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.text)
        .unit(panel.unit)
        .datasource(source)
        .height(8)
        .span(width)
        .fill_opacity(20 if panel.stacked else 5)
        .legend(common.VizLegendOptions().show_legend(True).placement(common_models.LegendPlacement.BOTTOM))
    )
    if not panel.signed:
        built = built.min(0)
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    for letter, (query, legend) in zip(ascii_uppercase, panel.queries):
        target = prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend)
        built = built.with_target(target.datasource(source))
    return built


def _variable(name: str, label: str, query: str, source: dashboard_models.DataSourceRef) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(source)
        .query(query)
        .refresh(dashboard_models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def build() -> str:
    """The dashboard as JSON."""
    source = dashboard_models.DataSourceRef(type_val="prometheus", uid="${datasource}")
    instances = 'label_values(limpid_ready{namespace=~"$namespace", job=~"$job"}, instance)'
    built = (
        dashboard.Dashboard("Limpid")
        .uid("limpid")
        .tags(["limpid"])
        .timezone("browser")
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(dashboard_models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", "label_values(limpid_ready, namespace)", source))
        .with_variable(_variable("job", "Job", 'label_values(limpid_ready{namespace=~"$namespace"}, job)', source))
        .with_variable(_variable("instance", "Instance", instances, source))
    )
    for title, panels in ROWS.items():
        built = built.with_row(dashboard.Row(title))
        width = 24 // min(4, len(panels))
        for panel in panels:
            built = built.with_panel(_panel(panel, source, width))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(build())
