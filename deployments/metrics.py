"""Metrics of a replica. One process runs one model, so the outlet adds the model's label."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30)

BATCH_ITEMS = Histogram(
    "dure_batch_items", "Items in a batch", registry=REGISTRY, buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
)
BATCH_TOKENS = Histogram(
    "dure_batch_tokens",
    "Tokens in a batch, before padding",
    registry=REGISTRY,
    buckets=(16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
)
BATCH_PADDED = Histogram(
    "dure_batch_padded_tokens",
    "Tokens in a batch, padding included",
    registry=REGISTRY,
    buckets=(16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
)
BATCH_SECONDS = Histogram("dure_batch_duration_seconds", "Time on the engine", registry=REGISTRY, buckets=SECONDS)
QUEUE = Gauge("dure_replica_queue_items", "Items waiting or running in the replica", registry=REGISTRY)
DROPPED = Counter(
    "dure_dropped_items", "Items never run, as the client had left or the deadline had passed", registry=REGISTRY
)
OUT_OF_MEMORY = Counter("dure_out_of_memory", "Batches that ran out of memory", registry=REGISTRY)
RELOADS = Counter("dure_reloads", "Reloads of a running model", ["status"], registry=REGISTRY)
WEIGHTS = Gauge("dure_weights_bytes", "Bytes of the model's weights", registry=REGISTRY)
LOAD_SECONDS = Gauge("dure_load_seconds", "Time from start of loading to ready", registry=REGISTRY)
GPU_MEMORY = Gauge(
    "dure_gpu_memory_bytes",
    "GPU memory that this process uses: reserved by torch, plus CUDA's own",
    registry=REGISTRY,
)
GPU_SHARE = Gauge("dure_gpu_share_bytes", "This replica's share of the GPU's memory", registry=REGISTRY)
GPU_PLANNED = Gauge("dure_gpu_planned_bytes", "GPU memory that the plan expects this replica to use", registry=REGISTRY)
GPU_OVER_SHARE = Gauge("dure_gpu_over_share", "1 if this replica uses more than its share", registry=REGISTRY)
