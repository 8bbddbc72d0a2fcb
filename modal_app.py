"""The deployment on Modal: `modal deploy modal_app.py`.

Consumers are spawned for the work that waits and leave when there is none: a scheduled function counts the backlog in
Redis and starts the `drain` calls that are missing. Everything they do is in `consumer` and `producer`.
"""

import asyncio

import modal
import modal.experimental

APP_NAME = "modal-sdxl-lora"
GPU = ["H200", "H100", "A100-80GB", "L40S"]
MAX_CONSUMERS = 10  # the cost cap
JOBS_PER_CONSUMER = 30
IDLE_EXIT_S = 60
DRAIN_TIMEOUT_S = 3600
STOP_BEFORE_TIMEOUT_S = 120

app = modal.App(APP_NAME)

weights = modal.Volume.from_name("sdxl-weights", create_if_missing=True)
secret = modal.Secret.from_name(
    "modal-sdxl-lora",
    required_keys=["REDIS_URL", "R2_ENDPOINT_URL", "R2_BUCKET_NAME", "R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY"],
)

base = modal.Image.debian_slim(python_version="3.11").add_local_file(
    "constraints.txt", "/root/constraints.txt", copy=True
)
gpu_image = (
    base.apt_install("gcc", "libc6-dev")  # Triton compiles what launches its kernels
    .pip_install_from_pyproject("pyproject.toml", ["consumer"], extra_options="-c /root/constraints.txt")
    .env({"HF_HOME": "/weights/huggingface", "TRITON_CACHE_DIR": "/weights/triton"})
    .add_local_python_source("consumer", "schemas")
)
cpu_image = base.pip_install_from_pyproject(
    "pyproject.toml", ["gateway", "modal"], extra_options="-c /root/constraints.txt"
).add_local_python_source("producer", "schemas")


@app.cls(
    image=gpu_image,
    gpu=GPU,
    volumes={"/weights": weights},
    secrets=[secret],
    max_containers=MAX_CONSUMERS,
    scaledown_window=60,
    startup_timeout=600,
    timeout=DRAIN_TIMEOUT_S,
)
class Consumer:
    """One GPU: loads the model once, then serves one `drain` after another."""

    @modal.enter()
    def load(self) -> None:
        from consumer import bootstrap, logs
        from consumer.settings import ConsumerSettings

        logs.configure()
        self.settings = ConsumerSettings(idle_exit_s=IDLE_EXIT_S)
        self.engine = bootstrap.load_engine(self.settings)
        weights.commit()

    @modal.method()
    async def drain(self) -> None:
        """Works until the queue has been empty for a while, and stops well before the platform would stop it."""
        from consumer import bootstrap

        async with bootstrap.wire(self.settings, self.engine, bootstrap.consumer_name()) as worker:
            asyncio.get_running_loop().call_later(DRAIN_TIMEOUT_S - STOP_BEFORE_TIMEOUT_S, worker.request_stop)
            await worker.run()
        if worker.broken is not None:
            modal.experimental.stop_fetching_inputs()  # the next drain gets another container
            raise worker.broken


@app.function(image=cpu_image, secrets=[secret], schedule=modal.Period(minutes=1), max_containers=1)
async def scale() -> int:
    """Spawns the missing drains and returns how many. A backend may call it after publishing, to wait for no minute."""
    from producer.backlog import missing_consumers, read_backlog
    from producer.queue import connect
    from producer.settings import ProducerSettings
    from schemas.keys import Keys

    settings = ProducerSettings()
    redis = connect(settings.redis_url.get_secret_value())
    try:
        backlog = await read_backlog(redis, Keys(settings.prefix))
    finally:
        await redis.aclose()
    drain = Consumer().drain
    stats = await drain.get_current_stats.aio()
    missing = missing_consumers(
        backlog.waiting,
        in_flight=stats.backlog + stats.num_running_inputs,
        jobs_per_consumer=JOBS_PER_CONSUMER,
        max_consumers=MAX_CONSUMERS,
    )
    for _ in range(missing):
        await drain.spawn.aio()
    return missing


@app.function(image=cpu_image, secrets=[secret])
@modal.concurrent(max_inputs=100)
@modal.asgi_app(label="gateway")
def web() -> object:
    """The HTTP gateway: `GET /health`, and the rest for whoever has `MODAL_API_TOKEN`, which the secret may hold."""
    from producer.gateway import create_app
    from producer.settings import ProducerSettings

    return create_app(ProducerSettings(), wake=scale.spawn.aio)
