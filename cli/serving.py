"""One run of `max serve`: the engine worker first, then everything that can be done while it loads."""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor

from ..cache.config import CacheConfig
from ..cache.scratch import Scratch
from ..runtime.config import ModelConfig, QueueConfig, SchedulingConfig
from ..serve import log_format
from ..serve.config import ServerConfig
from ..serve.listener import bind, raise_file_limit
from ..serve.supervisor import Supervisor
from ..serve.text_side import TextSide
from ..serve.worker_config import WorkerConfig
from .model_command import model_folder, pipeline_of
from .resolution import Settings

_LOGGER = logging.getLogger(__name__.partition(".")[0])


def serve(settings: Settings) -> None:
    """Serves until a signal comes. Raises MaxError when the port or the model cannot be used."""
    config, model = settings.of(ServerConfig), settings.of(ModelConfig)
    level = logging.getLevelName(_LOGGER.level or logging.INFO)
    log_format.set_up(structured=config.structured_logging, prefix=config.log_prefix, level=level)
    folder = model_folder(model)
    listener = bind(config.host, config.port, "--port")
    raise_file_limit()
    worker = WorkerConfig(
        folder=folder,
        pipeline=pipeline_of(settings),
        scheduling=settings.of(SchedulingConfig),
        queue=settings.of(QueueConfig),
        stall_timeout_s=config.decode_stall_timeout_s,
        log_level=level,
        structured_logging=config.structured_logging,
        log_prefix=config.log_prefix,
    )
    supervisor = Supervisor(worker, config.zmq_endpoint_base)
    # From here on the worker loads; reading the tokenizer and importing what answers HTTP take place beside it.
    arguments = (folder, config.chat_template, model.weight_path, settings.of(CacheConfig))
    text = ThreadPoolExecutor(1).submit(TextSide.load, *arguments)
    with Scratch("metrics") as shared:
        if config.api_workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.path)  # read when prometheus_client is imported
        _serve_over(supervisor, config, config.model_name(model.model_path), worker, text, listener)


def _serve_over(
    supervisor: Supervisor,
    config: ServerConfig,
    model_name: str,
    worker: WorkerConfig,
    text: Future[TextSide],
    listener: socket.socket,
) -> None:
    import uvloop

    from ..serve.api_process import ApiProcess
    from ..serve.api_worker_config import ApiWorkerConfig
    from ..serve.api_workers import ApiWorkers
    from ..serve.engine_client import EngineClient
    from ..serve.metrics import Metrics

    metrics_listener = None
    if config.metrics_port is not None:
        metrics_listener = bind(config.host, config.metrics_port, "--metrics-port")
    process = ApiProcess(config, model_name, text, listener, Metrics(model_name), metrics_listener)
    others = ApiWorkers(
        ApiWorkerConfig(
            server=config,
            model_name=model_name,
            folder=worker.folder,
            weight_path=worker.pipeline.model.weight_path,
            cache=worker.pipeline.cache,
            endpoint=supervisor.endpoint,
            listener=listener.fileno(),
            log_level=worker.log_level,
        ),
        listener,
        config.api_workers - 1,
    )

    async def run() -> None:
        async with EngineClient(supervisor.endpoint, supervisor) as port:
            await process.run(port, others)

    uvloop.run(run())
