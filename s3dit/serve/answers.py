"""What clients get: pictures in JSON, as files and as events, in the forms of OpenAI's API."""

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s3dit.plan import Plan
from s3dit.serve.job import Done, Partial, Queued, Started, StepDone
from s3dit.serve.pictures import file_of, public, zipped
from s3dit.serve.wanted import Wanted

# Content type by form; a zip holds several.
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to one request.

    kind: what its events are called, image_generation or image_edit · plan: what is drawn.
    """

    kind: str
    wanted: Wanted
    plan: Plan

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT of the pictures; several sizes are not asked for here."""
        request = (self.plan if self.plan.then is None else self.plan.then).request
        return f"{request.per_image('width')[0]}x{request.per_image('height')[0]}"

    def usage(self) -> dict[str, Any]:
        """Tokens that were read and drawn: of text, each text once; of pictures, 16 × 16 pixels each."""
        text = sum(map(len, {text for caption in self.plan.captions for text in caption}))
        rows, columns = self.plan.grids[0]
        start = rows * columns * bool(self.plan.start_images)
        seen = sum(r * c + len(each.patches) for each in self.plan.references[0] for r, c in [each.grid])
        drawn = sum(r * c for r, c in (self.plan if self.plan.then is None else self.plan.then).grids)
        return {
            "input_tokens": text + start + seen, "output_tokens": drawn, "total_tokens": text + start + seen + drawn,
            "input_tokens_details": {"text_tokens": text, "image_tokens": start + seen},
            "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        }  # fmt: skip

    def _shared(self) -> dict[str, Any]:
        """What every event with a picture says of it."""
        return {
            "created_at": int(time.time()), "size": self.size, "quality": "auto", "background": "opaque",
            "output_format": self.wanted.form,
        }  # fmt: skip

    def _files(self, done: Done) -> list[tuple[bytes, dict[str, Any]]]:
        """The file of every picture, and the metadata in it."""
        records = [public(metadata) for metadata in done.result.metadata]
        form, compression = self.wanted.form, self.wanted.compression
        pairs = zip(done.result.images, records, strict=True)
        return [(file_of(image, record, form, compression), record) for image, record in pairs]

    def whole(self, done: Done) -> dict[str, Any]:
        """The JSON of a request that is done."""
        who = {"safety_identifier": self.wanted.user} if self.wanted.user else {}
        notes = {"notes": list(self.plan.notes)} if self.plan.notes else {}
        data = [
            {"b64_json": base64.b64encode(file).decode(), "seed": record["seed"], "metadata": record}
            for file, record in self._files(done)
        ]
        return {
            "created": int(time.time()), "background": "opaque", "output_format": self.wanted.form, "size": self.size,
            "data": data, "usage": self.usage(), "seconds": _rounded(done.seconds), **notes, **who,
        }  # fmt: skip

    def file(self, done: Done) -> tuple[str, bytes]:
        """Content type and bytes: of the picture, or of a zip of several."""
        files = [file for file, _ in self._files(done)]
        form = self.wanted.form
        return (TYPES[form], files[0]) if len(files) == 1 else ("application/zip", zipped(files, form))

    def completed(self, done: Done) -> bytes:
        """The last events: one a picture."""
        who = {"safety_identifier": self.wanted.user} if self.wanted.user else {}
        notes = {"notes": list(self.plan.notes)} if self.plan.notes else {}
        return b"".join(
            event(
                f"{self.kind}.completed", b64_json=base64.b64encode(file).decode(), **self._shared(),
                usage=self.usage(), image_index=i, seed=record["seed"], metadata=record,
                seconds=_rounded(done.seconds), **notes, **who,
            )
            for i, (file, record) in enumerate(self._files(done))
        )  # fmt: skip

    def partial(self, partial: Partial) -> bytes:
        """The events of pictures on the way: one a picture, without metadata, since they are not what these say."""
        form, compression = self.wanted.form, self.wanted.compression
        return b"".join(
            event(
                f"{self.kind}.partial_image", **self._shared(), partial_image_index=partial.index, image_index=i,
                b64_json=base64.b64encode(file_of(image, None, form, compression)).decode(),
            )
            for i, image in enumerate(partial.images)
        )  # fmt: skip

    def progress(self, told: Queued | Started | StepDone) -> bytes:
        """The event of a place in the queue, of the start, or of a step; nothing where it is not asked for."""
        if not self.wanted.progress:
            return b""
        if isinstance(told, Queued):
            return event("s3dit.queued", position=told.position)
        return event("s3dit.started") if isinstance(told, Started) else event("s3dit.step", step=told.i, steps=told.n)


def event(kind: str, **data: Any) -> bytes:
    """One server-sent event; JSON in ASCII has no line feeds."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n".encode("ascii")


def error_event(body: Mapping[str, Any]) -> bytes:
    """The event of an error, which ends a stream."""
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode("ascii")


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name.replace(" ", "_"): round(value, 4) for name, value in seconds.items()}
