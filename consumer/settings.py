"""What a consumer reads from the environment, once, at its entry point."""

import tempfile
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio import ConnectionPool

DEFAULT_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


class ConsumerSettings(BaseSettings):
    """Every field is one variable of the contract's environment table; seconds may be decimals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    redis_url: SecretStr = Field(SecretStr("redis://localhost:6379/0"), alias="REDIS_URL")
    prefix: str = Field("sdxl", alias="SDXL_PREFIX", pattern=r"^[A-Za-z0-9_.-]+$")
    model: str = Field(DEFAULT_MODEL, alias="SDXL_MODEL")
    vae: str | None = Field(None, alias="SDXL_VAE")
    device: str = Field("cuda", alias="SDXL_DEVICE")
    dtype: str = Field("float16", alias="SDXL_DTYPE", pattern="^(float16|bfloat16|float32)$")
    speed: str = Field("auto", alias="SDXL_SPEED", pattern="^(auto|stock|fast)$")

    max_attempts: int = Field(3, alias="SDXL_MAX_ATTEMPTS", ge=1)
    lease_s: float = Field(30.0, alias="SDXL_LEASE_SECONDS", gt=0)
    prefetch: int = Field(1, alias="SDXL_PREFETCH", ge=0)
    idle_exit_s: float = Field(0.0, alias="SDXL_IDLE_EXIT_SECONDS", ge=0)
    drain_s: float = Field(25.0, alias="SDXL_DRAIN_SECONDS", ge=0)
    stall_s: float = Field(60.0, alias="SDXL_STALL_SECONDS", gt=0)
    retry_base_s: float = Field(5.0, alias="SDXL_RETRY_BASE_SECONDS", ge=0)
    retry_cap_s: float = Field(300.0, alias="SDXL_RETRY_CAP_SECONDS", ge=0)
    job_ttl_s: float = Field(604_800.0, alias="SDXL_JOB_TTL_SECONDS", gt=0)

    lora_allowed_hosts: str | None = Field(None, alias="LORA_ALLOWED_HOSTS")
    upload_allowed_hosts: str | None = Field(None, alias="UPLOAD_ALLOWED_HOSTS")
    allow_loopback: bool = Field(False, alias="LORA_ALLOW_LOOPBACK")
    lora_cache_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / "sdxl-lora-cache", alias="LORA_CACHE_DIR"
    )
    lora_cache_gb: float = Field(20.0, alias="LORA_CACHE_GB", ge=0)
    lora_max_mb: float = Field(1024.0, alias="LORA_MAX_MB", gt=0)

    r2_access_key_id: SecretStr | None = Field(None, alias="R2_ACCESS_KEY_ID")
    r2_secret_access_key: SecretStr | None = Field(None, alias="R2_SECRET_ACCESS_KEY")
    r2_bucket: str | None = Field(None, alias="R2_BUCKET_NAME")
    r2_endpoint_url: str | None = Field(None, alias="R2_ENDPOINT_URL")
    r2_public_url: str | None = Field(None, alias="R2_PUBLIC_URL")
    hub_token: SecretStr | None = Field(None, validation_alias=AliasChoices("HUGGINGFACE_HUB_TOKEN", "HF_TOKEN"))

    @field_validator("redis_url")
    @classmethod
    def _is_of_a_redis(cls, value: SecretStr) -> SecretStr:
        try:
            pool: Any = ConnectionPool.from_url(value.get_secret_value())
            pool.make_connection()  # connects to nothing yet
        except (TypeError, ValueError):
            raise ValueError("is not the URL of a Redis: redis://, rediss:// or unix://") from None
        return value

    @field_validator("r2_endpoint_url", "r2_public_url")
    @classmethod
    def _without_trailing_slash(cls, value: str | None) -> str | None:
        return None if value is None else value.rstrip("/")
