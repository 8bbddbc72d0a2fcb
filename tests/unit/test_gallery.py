"""The demo's page: complete, escaped, self-contained, and without anything that signs."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from typing import Any

import pytest

from demo.gallery import STAGES, Totals, render
from demo.jobs import EndedJob, PlannedJob
from schemas.events import AppliedLora, ModelInfo, TerminalEvent, Timings
from tests import event_kit

SCRIPT = "<script>alert('x')</script>"
SIGNED = "https://r2.example/b/style.safetensors?X-Amz-Credential=AKIA&X-Amz-Signature=c0ffee"
PNG = bytes(range(256)) * 3


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for each, attributes in self.tags if each == tag and name in attributes]


def ended(
    event: TerminalEvent | None = None,
    *,
    job_id: str = "job-1",
    group: str = "g",
    png: bytes | None = None,
    **fields: Any,
) -> EndedJob:
    job = PlannedJob(job_id, group, f"title of {job_id}", {"prompt": "a cat", **fields})
    return EndedJob(job, event, png)


def page(*ends: EndedJob, problems: tuple[str, ...] = ()) -> Page:
    return Page(render(ends, Totals(12.34, problems)))


def with_loras(*loras: AppliedLora) -> TerminalEvent:
    return event_kit.succeeded(model_info=ModelInfo(base_model="base", lora_applied=True, loras=loras))


def test_markup_in_what_others_wrote_is_text() -> None:
    lora = AppliedLora(name=SCRIPT, version=SCRIPT, scale=1.0, modules=3)
    drawn = event_kit.succeeded(
        image_key=SCRIPT,
        gpu=SCRIPT,
        warnings=(SCRIPT,),
        model_info=ModelInfo(base_model="b", lora_applied=True, loras=(lora,)),
    )
    html = render(
        [
            ended(drawn, prompt=SCRIPT, negative_prompt=SCRIPT, group=SCRIPT),
            ended(event_kit.failed("job-2", error=SCRIPT), job_id="job-2"),
        ],
        Totals(1.0, (SCRIPT,)),
    )
    assert "script" not in [tag for tag, _ in Page(html).tags]
    assert Page(html).text.count(SCRIPT) == 10
    assert "<script" not in html


def test_a_quote_does_not_end_an_attribute() -> None:
    shown = page(ended(event_kit.succeeded(), prompt='"><img src=x onerror=alert(1)>', png=PNG))
    assert [set(attributes) for tag, attributes in shown.tags if tag == "img"] == [{"src", "width", "height", "alt"}]


def test_every_job_has_a_card_with_its_events_id() -> None:
    ends = [
        ended(event_kit.succeeded("one"), job_id="one", png=PNG),
        ended(event_kit.failed("two"), job_id="two"),
        ended(event_kit.cancelled("three"), job_id="three", group="other"),
    ]
    shown = page(*ends)
    assert shown.attributes("article", "id") == ["one", "two", "three"]
    for event_id in ("one:1:succeeded", "two:1:failed", "three:1:cancelled"):
        assert event_id in shown.text


def test_a_job_without_an_event_has_a_card_too() -> None:
    shown = page(ended(None, job_id="lost"))
    assert shown.attributes("article", "id") == ["lost"]
    assert "No event arrived" in shown.text


def test_no_query_of_a_url_is_shown() -> None:
    ends = [
        ended(event_kit.failed(error=f"no answer from {SIGNED}"), lora_url=SIGNED, prompt=f"like {SIGNED}"),
        ended(
            event_kit.succeeded(image_url=SIGNED, warnings=(f"{SIGNED}: 2 keys",)), upload_url=SIGNED, lora_url=SIGNED
        ),
    ]
    html = render(ends, Totals(1.0, (f"{SIGNED} is gone",)))
    assert "style.safetensors" in html
    for secret in ("X-Amz", "c0ffee", "AKIA", "safetensors?"):
        assert secret not in html


def test_the_pictures_are_in_the_page_byte_for_byte() -> None:
    (source,) = page(ended(event_kit.succeeded(), png=PNG)).attributes("img", "src")
    head, _, body = source.partition(",")
    assert head == "data:image/png;base64"
    assert b64decode(body) == PNG


def test_the_page_fetches_and_runs_nothing() -> None:
    shown = page(ended(event_kit.succeeded(), png=PNG), ended(event_kit.succeeded(), png=None))
    targets = [*shown.attributes("img", "src"), *shown.attributes("a", "href")]
    assert len(targets) == 4
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in shown.tags}
    assert any("default-src 'none'" in policy for policy in shown.attributes("meta", "content"))


def test_a_picture_says_how_it_was_made() -> None:
    lora = AppliedLora(name="style.safetensors", version="v7", scale=0.35, modules=722, skipped=4)
    text = page(ended(with_loras(lora), png=PNG)).text
    for part in (
        "4294967295",
        "28",
        "5.5",
        "1024 × 768",
        "style.safetensors",
        "v7 · scale 0.35 · 722 modules · 4 skipped",
    ):
        assert part in text
    assert "abababababab…" in text


def test_a_failure_says_its_code_and_when_to_come_back() -> None:
    text = page(ended(event_kit.failed(error="the GPU fell off"))).text
    for part in ("GENERATION_FAILED", "the GPU fell off", "retry_after 30 s"):
        assert part in text


def test_a_failure_for_good_says_so() -> None:
    event = event_kit.failed()
    event = event.model_copy(update={"data": event.data.model_copy(update={"retry_after": None})})
    assert "can never succeed" in page(ended(event)).text


def test_a_failed_job_names_the_lora_that_it_asked_for() -> None:
    text = page(ended(event_kit.failed(), lora_key="loras/ember.safetensors", lora_scale=0.5)).text
    assert "ember.safetensors" in text
    assert "scale 0.5" in text


def test_the_bars_share_the_scale_of_the_longest_job() -> None:
    def timed(total: float) -> EndedJob:
        times = Timings(queued=total - 1, prepare=0.1, generate=0.7, encode=0.1, upload=0.1, total=total)
        return ended(event_kit.succeeded(timings=times), png=PNG)

    shown = page(timed(10.0), timed(5.0))
    widths = [
        float(match[1])
        for style in shown.attributes("i", "style")
        if (match := re.fullmatch(r"width: ([\d.]+)%", style))
    ]
    assert len(widths) == 2 * len(STAGES)
    assert widths[0] == pytest.approx(90.0)
    assert sum(widths[: len(STAGES)]) == pytest.approx(100.0)
    assert sum(widths[len(STAGES) :]) == pytest.approx(50.0)


def test_every_stage_is_in_each_legend() -> None:
    text = page(ended(event_kit.succeeded(), png=PNG)).text
    for stage, seconds in zip(STAGES, range(1, 6), strict=True):
        assert f"{stage} {seconds}.00 s" in text


def test_the_totals_count_pictures_and_failures() -> None:
    html = render([ended(event_kit.succeeded()), *[ended(event_kit.failed())] * 2], Totals(12.34))
    for name, value in (("jobs", "3"), ("pictures", "1"), ("refused", "2"), ("in all", "12.3 s"), ("drawn on", "H200")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in html


def test_what_did_not_go_as_planned_stands_at_the_top() -> None:
    assert "the listener slept" in page(problems=("the listener slept",)).text
    assert "problems" not in {name for _, attributes in page().tags for name in attributes.values()}
