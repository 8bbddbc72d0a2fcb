"""What is wrong with a LoRA file."""

from pydantic import JsonValue


class LoraUnusable(Exception):
    """The file is no LoRA for the model. `details`: what a program wants to know of the reason."""

    def __init__(self, message: str, *, details: dict[str, JsonValue] | None = None) -> None:
        super().__init__(message)
        self.details: dict[str, JsonValue] = details or {}
