"""One consumer's start up to its first picture: `benchmarks.cold_start` runs it in processes of its own.

Settings come from the environment, as a consumer's do. The arguments are a LoRA's file and the request, as JSON. Prints
when each phase ended, as JSON pairs of names and Unix times. It imports nothing before the clock runs, and then what
`python -m consumer` imports before it does anything.
"""

import time


def main() -> None:
    marks = [("interpreter", time.time())]
    import importlib
    import json
    import sys
    from pathlib import Path

    import structlog

    importlib.import_module("consumer.__main__")
    from consumer.bootstrap import load_engine
    from consumer.engine import LoraFile
    from consumer.images import encode_png
    from consumer.settings import ConsumerSettings
    from schemas.events import ModelInfo
    from schemas.requests import GenerationRequest, LoraRef

    def mark(logger: object, method: str, event: structlog.typing.EventDict) -> str:
        marks.append((str(event["event"]), time.time()))
        raise structlog.DropEvent

    structlog.configure(processors=[mark])
    marks.append(("imports", time.time()))
    engine = load_engine(ConsumerSettings())
    marks.append(("ready", time.time()))
    file, request = Path(sys.argv[1]), GenerationRequest.model_validate_json(sys.argv[2])
    prepared = engine.prepare([LoraFile(file, LoraRef(key="loras/first.safetensors"))])
    image = engine.generate(request, prepared, lambda step, total: None)
    model = ModelInfo(base_model=engine.base_model, lora_applied=True, loras=image.loras)
    encode_png(image.pixels, request, model, sampler=image.sampler)
    marks.append(("first picture", time.time()))
    sys.stdout.write(json.dumps(marks) + "\n")


if __name__ == "__main__":
    main()
