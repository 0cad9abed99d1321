"""Every Prometheus series of the service, in one place. Base units; no label that a client can choose freely."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from service import __version__

disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BYTES = tuple(4.0**power for power in range(4, 15))
_ITEMS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_BITS_PER_PIXEL = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3, 1.6, 2.0, 3.0, 5.0, 10.0, 24.0)


class Metrics:
    """The series of one app, in a registry of their own. Names carry the prefix `limpid_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"limpid_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"limpid_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"limpid_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("http_requests_total", "Requests answered.", "operation", "status")
        self.rejected = counter("rejected_total", "Requests refused, by problem type.", "reason")
        self.disconnects = counter("client_disconnects_total", "Clients that hung up before their answer.", "phase")
        self.batch_retries = counter("batch_retries_total", "Failed batches that were halved.", "reason")
        self.pixels = counter("pixels_total", "Pixels of photos processed.", "operation", "model")
        self.bitstream_bytes = counter("bitstream_bytes_total", "Bytes of bitstreams.", "operation", "model")
        self.image_bytes = counter("image_bytes_total", "Bytes of image files, in or out.", "operation", "model")
        self.degradations = counter("degradations_total", "Degradations that the encoder reported.", "kind")
        self.efforts = counter("efforts_total", "Photos compressed, by the effort that was asked for.", "effort")
        self.device_steps = counter("device_steps_total", "Steps of the transforms; a device at work makes them.")
        self.request_seconds = histogram(
            "http_request_duration_seconds", "From first byte to answer; not of 429.", _SECONDS, "operation"
        )
        self.stage_seconds = histogram(
            "stage_duration_seconds", "Time of one stage of a request.", _SECONDS, "operation", "stage"
        )
        self.request_bytes = histogram("request_body_bytes", "Bytes of request bodies.", _BYTES, "operation")
        self.response_bytes = histogram("response_body_bytes", "Bytes of response bodies.", _BYTES, "operation")
        self.batch_size = histogram("batch_size", "Items per batch.", _ITEMS, "operation", "model")
        self.bits_per_pixel = histogram(
            "bits_per_pixel", "Bitstream bits over photo pixels.", _BITS_PER_PIXEL, "model", "rate"
        )
        self.in_progress = gauge(
            "requests_in_progress", "Requests between their admission and their answer.", "operation"
        )
        self.queue_items = gauge("queue_items", "Requests waiting for the device.")
        self.queue_bytes = gauge("queue_bytes", "Bytes of photos and bitstreams waiting for the device.")
        self.queue_seconds = gauge("queue_seconds", "In which what waits, and runs before it, will be done.")
        self.bytes_in_progress = gauge(
            "bytes_in_progress", "Of bodies, as announced or as they came, and of answers that are still being taken."
        )
        self.byte_limit = gauge("byte_limit", "Most bytes in progress, and waiting for the device; beyond it, 429.")
        self.batches = gauge("batches_in_progress", "Batches that the device has, also those nobody waits for.")
        self.admission_limit = gauge("admission_limit", "Most requests in progress at a time; beyond it, 429.")
        gauge("memory_limit_bytes", "Of the container, else of the machine.").set(memory_limit())
        self.ready = gauge("ready", "1 when the service answers requests, else 0.")
        self.model_loaded = gauge("model_loaded", "1 for every model on the device.", "model", "device")
        self.store_reloads = counter("store_reloads_total", "Reloads of the model store on SIGHUP.", "outcome")
        self.gpu_memory = gauge("gpu_memory_bytes", "Memory that torch holds on a GPU.", "device", "kind")
        build = gauge("build_info", "1, with the versions as labels.", "version", "python", "torch")
        build.labels(__version__, platform.python_version(), torch.__version__).set(1)

    def observe_gpu_memory(self) -> None:
        """Read torch's allocator; without a GPU there is nothing to read."""
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                name = f"cuda:{index}"
                self.gpu_memory.labels(name, "allocated").set(torch.cuda.memory_allocated(index))
                self.gpu_memory.labels(name, "reserved").set(torch.cuda.memory_reserved(index))


def memory_limit(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may use: the least of its control groups (v2, v1) and the machine's memory."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    for _, controllers, path in lines:
        if controllers == "":
            top, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                text = (folder / name).read_text().strip()
            except OSError:  # a container sees its own group at the top
                continue
            if text.isdigit():
                limits.append(int(text))
    return min(limits)
