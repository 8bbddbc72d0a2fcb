"""What the backend's side reads from the environment, once, at its entry point."""

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from producer.submissions import QueueLimits

DEFAULT_DATABASE_URL = "sqlite:///sdxl.db"


class ProducerSettings(BaseSettings):
    """Every field is one variable of the contract's environment table; seconds may be decimals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    redis_url: SecretStr = Field(SecretStr("redis://localhost:6379/0"), alias="REDIS_URL")
    prefix: str = Field("sdxl", alias="SDXL_PREFIX", pattern=r"^[A-Za-z0-9_.-]+$")
    max_queue: int = Field(10_000, alias="SDXL_MAX_QUEUE", ge=1)
    max_queue_per_tenant: int = Field(0, alias="SDXL_MAX_QUEUE_PER_TENANT", ge=0)
    max_completions: int = Field(100_000, alias="SDXL_MAX_COMPLETIONS", ge=0)
    job_ttl_s: float = Field(604_800.0, alias="SDXL_JOB_TTL_SECONDS", gt=0)
    database_url: SecretStr = Field(SecretStr(DEFAULT_DATABASE_URL), alias="DATABASE_URL")

    model: str | None = Field(None, alias="SDXL_MODEL")  # the consumers' own: `doctor` alone looks at it

    r2_access_key_id: SecretStr | None = Field(None, alias="R2_ACCESS_KEY_ID")
    r2_secret_access_key: SecretStr | None = Field(None, alias="R2_SECRET_ACCESS_KEY")
    r2_bucket: str | None = Field(None, alias="R2_BUCKET_NAME")
    r2_endpoint_url: str | None = Field(None, alias="R2_ENDPOINT_URL")

    webhook_secret: SecretStr | None = Field(None, alias="WEBHOOK_SECRET")
    webhook_allowed_hosts: str | None = Field(None, alias="WEBHOOK_ALLOWED_HOSTS")
    allow_loopback: bool = Field(False, alias="LORA_ALLOW_LOOPBACK")
    api_token: SecretStr | None = Field(None, alias="MODAL_API_TOKEN")

    @property
    def limits(self) -> QueueLimits:
        return QueueLimits(self.max_queue, self.max_queue_per_tenant, self.max_completions)

    @field_validator("r2_endpoint_url")
    @classmethod
    def _without_trailing_slash(cls, value: str | None) -> str | None:
        return None if value is None else value.rstrip("/")
