"""Which URLs this product opens, and the one HTTP client that opens them. Both sides use it; see ADR 8."""
