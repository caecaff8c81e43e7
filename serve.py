"""A server in OpenAI's format for a base model and its adapters, on this machine."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jlora.cli.command import run_command
from jlora.cli.flags import REPEATED
from jlora.cli.process_setup import keep_compiled
from jlora.config.json_fields import MAX_SIZE
from jlora.config.run_config import BaseDtype, ModelConfig
from jlora.errors import UsageError, warn

_CONTEXT = 4096


@dataclass(frozen=True)
class Arguments:
    """Serve a base model and its adapters, in OpenAI's format."""

    model: str
    """HF folder, hub id, .gguf file or converted base; its name is the last part."""
    adapter: list[str] = field(default_factory=list, metadata=REPEATED)
    """Run or PEFT adapter folder, or NAME=FOLDER; may be given several times."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0: any that is free."""
    slots: int = 4
    """Texts that are generated at one time; others wait."""
    context: int | None = None
    """Tokens of the longest text with its prompt; null: 4096, or the model's maximum if less."""
    max_new_tokens: int | None = None
    """Most tokens that a request may ask for; null: what the context has room for."""
    max_requests: int = 64
    """Texts that are generated or wait at one time; more are refused (429)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations and matmuls; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    base_dtype: BaseDtype = "keep"
    """Dtype of the weights, as --compute.base_dtype of a training."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        if not 0 <= self.port < 2**16:
            raise UsageError(f"port={self.port}; expected 0 to 65535")
        for name in ("slots", "context", "max_new_tokens", "max_requests"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIZE:
                raise UsageError(f"{name}={value}; expected at least 1")
        self.named_adapters()

    def named_adapters(self) -> dict[str, str]:
        """Returns {name: folder} of the adapters, whose names differ from the base's.

        Raises:
            UsageError: two have the same name.
        """
        found: dict[str, str] = {}
        for text in self.adapter:
            name, is_named, folder = text.partition("=")
            folder = folder if is_named else text
            name = name if is_named else Path(text).name
            if name in found or name == self.base_name or not name:
                raise UsageError(
                    f"--adapter {text}: the name {name!r} is taken; give another, as in "
                    "NAME=FOLDER"
                )
            found[name] = folder
        return found

    @property
    def base_name(self) -> str:
        """The name of the base in requests."""
        return Path(self.model).name


def main(args: Arguments) -> None:
    """Loads the model and the adapters, and serves until a signal."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.loading import load_for_text, open_adapter
    from jlora.serving.adapter_rows import stack_adapters
    from jlora.serving.slots import Slots

    try:
        import uvicorn

        from jlora.serving.http_server import HttpServer
        from jlora.serving.openai_server import LOOPBACK, Api, Limits
    except ImportError as error:
        raise UsageError(
            f"jlora serve needs {error.name}: pip install 'jlora[serve]'"
        ) from error
    named = args.named_adapters()
    adapters = [open_adapter(folder) for folder in named.values()]
    keep_compiled()
    loaded = load_for_text(
        ModelConfig(model=args.model, dtype=args.dtype, base_dtype=args.base_dtype)
    )
    config = loaded.model.config
    context = args.context or min(_CONTEXT, config.longest)
    config.check_length(context, "context")
    rope = config.rope_parameters.rope_type
    if rope in ("dynamic", "longrope"):
        warn(
            f"{rope} rotary angles depend on a text's length, for which this server takes "
            f"--context {context}; shorter texts may differ from those of jlora generate"
        )
    stacked = stack_adapters(loaded.params, config, adapters)
    key = os.environ.get("JLORA_API_KEY") or None
    if args.host not in LOOPBACK and key is None:
        warn(
            f"anyone who reaches {args.host} can use the server; set JLORA_API_KEY to a key "
            "that clients have to send"
        )
    names = dict(zip([args.base_name, *named], range(len(named) + 1), strict=True))
    limits = Limits(context, args.max_new_tokens, args.max_requests, key)
    api = Api(loaded.tokenizer, names, limits, config.vocab_size)
    server = HttpServer(
        uvicorn.Config(
            api.app(args.host), log_config=None, access_log=False, lifespan="off"
        )
    )
    api.stop = lambda: setattr(server, "should_exit", True)
    with (
        _listening(args.host, args.port) as listener,
        Slots(
            loaded, stacked, count=args.slots, size=context, failed=api.failed
        ) as api.slots,
    ):
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(names)} on http://{shown}:{port}/v1", flush=True)
        server.run([listener])
    if api.failure is not None:
        raise api.failure


def _listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        UsageError: the address or port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"{host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from error


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
