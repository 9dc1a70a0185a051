"""Where and how `max serve` answers."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ByteSize

from ..cache.fields import setting
from ..runtime.config import FeaturesConfig


def _positive(size: ByteSize) -> ByteSize:
    if size <= 0:
        raise ValueError("must be more than 0 bytes, such as 32MB")
    return size


class ServerConfig(FeaturesConfig):
    """The HTTP side of a server. Nothing here changes compiled code."""

    host: str = setting("127.0.0.1", compiles=False, environment="MAX_SERVE_HOST", min_length=1)
    """Interface to listen on: an address or a name; 0.0.0.0 for all of them."""

    port: int = setting(8000, compiles=False, environment="MAX_SERVE_PORT", ge=0, le=65535)
    """TCP port to listen on; 0 takes a free one, which is shown at the start."""

    api_workers: int = setting(1, compiles=False, ge=1, le=64)
    """Processes that answer HTTP on the one port. All of them use the same engine worker."""

    served_model_name: str | None = setting(None, compiles=False, min_length=1, max_length=512)
    """Name of the model for clients [default: --model as it was given, or "built-in"]."""

    chat_template: str | None = setting(None, compiles=False)
    """Chat template to use instead of the model's: Jinja text, or the path of a file with it."""

    temperature: float | None = setting(None, compiles=False, ge=0, le=2)
    """Temperature of requests that name none [default: the checkpoint's, else 1]."""

    top_k: int | None = setting(None, compiles=False, ge=-1)
    """Top-k of requests that name none [default: the checkpoint's, else 255]."""

    shutdown_timeout: float = setting(30.0, compiles=False, ge=0, le=86400)
    """Seconds that requests in work have to finish after SIGTERM or SIGINT; a second signal ends the server at once."""

    keep_alive_timeout: int = setting(180, compiles=False, ge=1, le=86400)
    """Seconds that an idle connection stays open. Longer than a proxy in front keeps its own, or that one fails."""

    max_request_size: Annotated[ByteSize, AfterValidator(_positive)] = setting(ByteSize(32 * 10**6), compiles=False)
    """Bytes that the body of a request may have."""

    metrics_port: int | None = setting(
        None, compiles=False, environment="MAX_SERVE_METRICS_ENDPOINT_PORT", ge=0, le=65535
    )
    """A further port that answers /metrics and nothing else, such as 8001. The API's port answers it always."""

    zmq_endpoint_base: str | None = setting(None, compiles=False)
    """ipc:// and the absolute path of a private folder for the sockets between the processes [default: a fresh one]."""

    structured_logging: bool = setting(False, compiles=False, environment="MODULAR_STRUCTURED_LOGGING")
    """Log one JSON object per line."""

    log_prefix: str = setting("", compiles=False)
    """Text before every line of the log, to tell servers apart."""

    enable_echo: bool = setting(True, compiles=False)
    """Put the prompt before the answer where a completion asks for it; without, such requests are refused."""

    enable_variable_logits: bool = setting(True, compiles=False)
    """Compute logits of a prompt's tokens, for the log-probabilities of an echoed prompt; without, requests for them
    are refused."""

    decode_stall_timeout_s: float | None = setting(
        None, compiles=False, environment="MODULAR_DECODE_STALL_TIMEOUT_S", gt=0, le=86400
    )
    """Seconds after which an engine that has requests and finishes no step is started anew; its requests end with an
    error [default: never]."""

    allow_extra_request_fields: bool = setting(False, compiles=False)
    """Drop unknown top-level fields of a request with a warning in the log instead of refusing it."""

    allow_unsupported_logprobs: bool = setting(False, compiles=False)
    """Answer a request for log-probabilities that cannot be given without them, with a warning in the log, instead of
    refusing it."""

    def model_name(self, model_path: Path | None) -> str:
        """The name under which clients ask for the model."""
        return self.served_model_name or ("built-in" if model_path is None else str(model_path))
