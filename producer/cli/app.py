"""The commands, each registered once."""

import sys

import structlog
import typer

from producer.cli import dead, doctor, jobs, listen, lora, publish, replay, serve, wait, webhooks, work
from producer.cli.command import blocking_command, command
from schemas.redact import redact_value
from schemas.stderr import redact_stderr

app = typer.Typer(
    help="Submit pictures to the queue, wait for them, and look after what became of them.",
    epilog="Exit status: 0 success, 1 a job that failed, 2 bad usage, 3 Redis or storage out of reach.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
dead_app = typer.Typer(help="Jobs that failed and could succeed: look at them, run them again.", no_args_is_help=True)
lora_app = typer.Typer(help="LoRA files, before anybody asks for a picture with them.", no_args_is_help=True)
webhooks_app = typer.Typer(help="Deliveries of webhooks, and the endpoints that want none.", no_args_is_help=True)


@app.callback()
def _log_to_stderr() -> None:
    redact_stderr()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            lambda _logger, _method, event: redact_value(event),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


app.command()(command(publish.publish))
app.command()(command(wait.wait))
app.command()(command(jobs.status))
app.command()(command(jobs.cancel))
app.command()(command(jobs.stats))
app.command()(command(listen.listen))
app.command()(command(serve.serve))
app.command()(command(doctor.doctor))
app.command()(blocking_command(work.work))
dead_app.command("list")(command(dead.list_letters))
dead_app.command("show")(command(dead.show_letter))
dead_app.command("replay")(command(replay.replay_letters))
dead_app.command("drop")(command(dead.drop_letters))
app.add_typer(dead_app, name="dead")
lora_app.command("check")(command(lora.check))
app.add_typer(lora_app, name="lora")
webhooks_app.command("list")(command(webhooks.list_deliveries))
webhooks_app.command("show")(command(webhooks.show_delivery))
webhooks_app.command("retry")(command(webhooks.retry_deliveries))
webhooks_app.command("disabled")(command(webhooks.list_disabled))
webhooks_app.command("disable")(command(webhooks.disable_endpoint))
webhooks_app.command("enable")(command(webhooks.enable_endpoint))
app.add_typer(webhooks_app, name="webhooks")
