"""`opdsl serve`: a model that answers scoring requests, so that a teacher can sit elsewhere."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import click


@click.command("serve", short_help="Serve a teacher's scores over HTTP.")
@click.argument("model", metavar="MODEL")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8011, show_default=True, type=click.IntRange(0, 65535))
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1. [cuda if there is one]")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="[bf16 on cuda, else fp32]"
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    default=16_384,
    show_default=True,
    help="Most tokens in one forward pass, padding included.",
)
@click.option("--name", metavar="NAME", help="What the model is called. [MODEL]")
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Requests that may wait; further ones are told to come back.",
)
@click.option(
    "--max-body-mb",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Largest request.",
)
@click.option(
    "--api-key-env",
    metavar="VARIABLE",
    help="Environment variable with a key that every request must bring.",
)
def serve(model: str, **options: Any) -> None:
    """Answer scoring requests with MODEL: a transformers folder, a hub name, or `embedded[:TASK]`
    for the built-in teacher.

    `opdsl run … --teacher NAME=http://HOST:PORT` trains against it. SIGTERM and Ctrl-C end it
    after the request in progress.
    """
    from opdsl.cli.run import reported

    with reported(as_json=False):
        _serve(model, options)


def _serve(model: str, options: dict[str, Any]) -> None:
    from opdsl.serve.loading import load
    from opdsl.serve.server import ScoringServer
    from opdsl.train.errors import problem
    from opdsl.train.progress import make_progress

    variable = options["api_key_env"]
    key = os.environ.get(variable, "").strip() if variable else None
    if variable and not key:
        raise problem(
            "OPD730",
            f"the environment variable {variable} holds no key",
            helps=[f"export {variable}=…"],
        )
    progress = make_progress(False)
    try:
        scorer = load(
            model,
            device=options["device"],
            dtype=options["dtype"],
            name=options["name"],
            max_batch_tokens=options["max_batch_tokens"],
            progress=progress.stage,
        )
    finally:
        progress.close()
    try:
        server = ScoringServer(
            scorer,
            options["host"],
            options["port"],
            queue=options["queue"],
            max_body=options["max_body_mb"] << 20,
            key=key,
        )
    except OSError as error:
        raise problem(
            "OPD730",
            f"cannot listen on {options['host']}:{options['port']}:"
            f" {(error.strerror or str(error)).lower()}",
            helps=["another --port; 0 takes a free one"],
        ) from None
    _until_asked(server, scorer, options["host"], key)


def _until_asked(server: Any, scorer: Any, host: str, key: str | None) -> None:
    """Serve until a signal comes, then end in order."""
    ended = threading.Event()
    before = {n: signal.signal(n, lambda *_: ended.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    click.echo(
        f"serving {scorer.name}: {scorer.parameters / 1e6:.2f} M parameters,"
        f" {scorer.vocabulary} words, {scorer.device.type}"
    )
    click.echo(f"use it    opdsl run SPEC --teacher NAME={server.url}")
    if host not in ("127.0.0.1", "::1", "localhost") and key is None:
        click.echo("note      anyone who reaches this address may ask; see --api-key-env", err=True)
    server.start()
    try:
        while not ended.wait(0.2):
            pass
    finally:
        server.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    jobs = server.jobs
    click.echo(
        f"ended     {jobs.answered} requests answered, {server.refused} refused,"
        f" {jobs.expired} given up by their askers"
    )
