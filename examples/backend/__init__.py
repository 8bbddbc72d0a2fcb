"""A small backend that makes pictures of avatars: from an HTTP request to a stored row, without a call that waits.

Read it in this order: `tables`, `content` (what is stored), `app` (HTTP), `relay` and `publishing` (outbox to queue),
`listening` (events to content), `loops` (what runs). `endpoint` is the other provider: a call that waits.
"""
