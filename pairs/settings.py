"""What a sampler is told, and what it gives back."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime.weights import model_identity

from .server import served_model


@dataclass(frozen=True)
class Settings:
    """How samples are drawn."""

    model: str                     # folder or hub name; with a server only its tokenizer is used
    template: str = "chat"
    instruction: str | None = None
    template_args: dict[str, Any] | None = None  # variables of the chat template
    temperature: float = 0.8       # 0 takes the likeliest token
    top_p: float = 0.95
    max_new_tokens: int = 2048
    seed: int = 0
    dtype: str | None = None       # of the model in this process; None: bfloat16 on CUDA, else float32
    batch_tokens: int = 0          # samples x (prompt + new tokens) per batch; 0: 131072 on CUDA, else 16384
    cuda_graphs: bool = False      # one launch for all kernels of a token, on CUDA
    server: str | None = None      # address of an OpenAI-compatible server; None: this process
    server_model: str | None = None
    concurrency: int = 64          # requests that a server has to answer at the same time

    def identity(self) -> dict[str, Any]:
        """All that a sample depends on, besides its prefix."""
        names = ("template", "instruction", "template_args", "temperature", "top_p", "max_new_tokens", "seed",
                 "dtype")
        if self.server:
            model = served_model(self.server, self.server_model)
        else:
            model = model_identity(self.model)
        return {"model": model, **{name: getattr(self, name) for name in names}}


class Continuation(NamedTuple):
    """What a model has written after a prompt, as a sampler draws it."""

    text: str
    tokens: int
    cut: bool  # ended by max_new_tokens or for lack of positions, not by the model
