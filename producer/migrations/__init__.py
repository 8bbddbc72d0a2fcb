"""The steps from one version's tables to the next. `producer.database.migrate` takes them."""
