"""What this backend reads from the environment, once, where it is started."""

from typing import Literal, Self

from pydantic import Field, model_validator

from producer.settings import ProducerSettings


class BackendSettings(ProducerSettings):
    """The queue's variables (`REDIS_URL`, `DATABASE_URL`, `R2_*`, ...) and this backend's own; seconds may be decimals.

    `provider`: `modal` publishes to the queue; `http` calls `POST /generate-image` of the endpoint, and waits.
    """

    provider: Literal["modal", "http"] = Field("modal", alias="LORA_PROVIDER")
    endpoint_url: str | None = Field(None, alias="MODAL_ENDPOINT_URL")
    poll_s: float = Field(2.0, alias="MODAL_POLL_SECONDS", gt=0)
    timeout_s: float = Field(300.0, alias="MODAL_TIMEOUT_SECONDS", ge=1)

    @model_validator(mode="after")
    def _http_needs_an_endpoint(self) -> Self:
        if self.provider == "http" and self.endpoint_url is None:
            raise ValueError("LORA_PROVIDER=http needs MODAL_ENDPOINT_URL")
        return self
