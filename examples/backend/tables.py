"""This backend's own tables. The listener's are in the same database; the two sets share no name and no row."""

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Integer, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from producer.database import open_engine
from schemas.keys import Priority

PENDING, SUCCEEDED, FAILED, CANCELLED = "pending", "succeeded", "failed", "cancelled"


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text,
        int: BigInteger,
        dict[str, Any]: JSON(none_as_null=True),
    }


class LoraModel(Base):
    """A trained LoRA: `key` in the own bucket, which consumers read themselves, or a public `url` elsewhere."""

    __tablename__ = "lora_models"

    id: Mapped[str] = mapped_column(primary_key=True)
    trigger_word: Mapped[str]
    key: Mapped[str | None]
    url: Mapped[str | None]
    scale: Mapped[float] = mapped_column(default=1.0)
    version: Mapped[str | None]


class Avatar(Base):
    __tablename__ = "avatars"

    id: Mapped[str] = mapped_column(primary_key=True)
    base_prompt: Mapped[str]
    lora_model_id: Mapped[str | None] = mapped_column(ForeignKey("lora_models.id"))
    lora_model: Mapped[LoraModel | None] = relationship()


class Content(Base):
    """A picture that somebody asked for. `run` is the run that its outcome is of, 0 before there is one.

    `retry_after` is in seconds: when a new run can succeed (0: at once), None: never. `timings` are in seconds.
    """

    __tablename__ = "content"

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(unique=True)
    avatar_id: Mapped[str] = mapped_column(ForeignKey("avatars.id"))
    prompt: Mapped[str]
    tier: Mapped[str]
    status: Mapped[str] = mapped_column(default=PENDING)
    run: Mapped[int] = mapped_column(default=0)
    image_url: Mapped[str | None]
    image_key: Mapped[str | None]
    image_sha256: Mapped[str | None]
    seed: Mapped[int | None]
    timings: Mapped[dict[str, Any] | None]
    error_code: Mapped[str | None]
    error: Mapped[str | None]
    retry_after: Mapped[int | None]


class OutboxEntry(Base):
    """A request that is to be published. It is written with its content, and deleted when the queue has it."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job_id: Mapped[str] = mapped_column(unique=True)
    priority: Mapped[Priority] = mapped_column(Text)
    request: Mapped[dict[str, Any]]


def open_sessions(database_url: str) -> sessionmaker[Session]:
    """Sessions of the database; nothing connects before the first one does. Raises DatabaseRefused."""
    return sessionmaker(open_engine(database_url), expire_on_commit=False)
