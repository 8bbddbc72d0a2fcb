"""What alembic runs: it is handed a connection that is in a transaction already."""

from alembic import context

from producer.database import VERSION_TABLE
from producer.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE
)
context.run_migrations()
