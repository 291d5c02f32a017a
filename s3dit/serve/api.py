'''The HTTP interface: routes, what they take and what they answer.

    GET  /                        page.html, with a Content-Security-Policy that allows its own inline script and style
    GET  /health                  200 {"status": "ok"}; 503 {"status": "dead" | "stopping"}; needs no key
    GET  /metrics                 Prometheus text
    GET  /openapi.json            this interface as an OpenAPI 3.1 document, made of the same table of fields
    GET  /v1/models, /v1/models/ID
    GET  /v1/options              what this server draws: see below
    POST /v1/images/generations   application/json
    POST /v1/images/edits         multipart/form-data: image (or image[]), mask, reference (or reference[]), and fields

With a key, all but / and /health want `Authorization: Bearer KEY`. Every answer has an X-Request-Id, the client's own
where it sends one. Where a client closes its connection, what it asked for is cancelled between two steps.

A field that is unknown or has no effect is an error. Errors have OpenAI's form, with `param` the field that is wrong:
    {"error": {"message": "...", "type": "invalid_request_error", "param": "size", "code": "invalid_value"}}
    400 a field · 401 the key · 403 another site's page, or a Host that is not this one · 404 a path or model ·
    413 a body, picture or part beyond its bound · 415 another content type · 429 a full queue (Retry-After: seconds) ·
    500 a failure of ours · 503 stopping (Retry-After), dead · 504 longer than --timeout.

The answer to a POST without `stream` (response_format b64_json):
    {"created": 1764300000, "background": "opaque", "output_format": "png", "size": "1024x1024",
     "data": [{"b64_json": "...", "seed": 7, "metadata": {...}}], "usage": {...}, "seconds": {"queue": 0.1, ...}}
metadata is what the file carries (fields of a Request; `s3dit generate --replay` draws it again), one entry a picture.
response_format "file" answers with the picture's bytes, or a zip of 1.png, 2.png, ... where n > 1.

With `stream: true` the answer is text/event-stream, each event one `event:` and one `data:` line of JSON:
    event: image_generation.partial_image    (image_edit.partial_image of edits), partial_images of each picture
    data: {"type": "image_generation.partial_image", "b64_json": "...", "partial_image_index": 0, "created_at": ...,
           "size": "1024x1024", "quality": "auto", "background": "opaque", "output_format": "png", "image_index": 0}
    event: image_generation.completed        one of each picture
    data: {"type": "image_generation.completed", "b64_json": "...", "created_at": ..., "size", "quality",
           "background", "output_format", "usage": {...}, "image_index": 0, "seed": 7, "metadata": {...},
           "seconds": {...}}
    event: error
    data: {"error": {...}}                   and the stream ends
With `progress: true` (ours; without it a client of OpenAI's sees only events that it knows) also:
    event: s3dit.queued    data: {"type": "s3dit.queued", "position": 2}      again when it changes
    event: s3dit.started   data: {"type": "s3dit.started"}
    event: s3dit.step      data: {"type": "s3dit.step", "step": 3, "steps": 8}
Lines that begin with a colon keep the connection open.

GET /v1/options answers, for the page and for programs:
    {"model": "Z-Image-Turbo", "variant": "turbo", "version": "0.1.0", "sizes": ["1024x1024", ...],
     "defaults": {"size": "1024x1024", "num_inference_steps": 8, "guidance_scale": 0.0, "solver": "euler", ...},
     "solvers": [...], "schedules": [...], "loras": [{"name": "style", "scale": 1.0}],
     "references": 0,                          how many reference pictures the model takes; 0: none
     "limits": {"n": 10, "steps": 200, "pixels": 4194304, "side": 8192, "multiple": 16, "prompt": 32000,
                "partial_images": 3, "body": 33554432, "image_pixels": 16777216},
     "example": "a red star above a blue ring",
     "fields": {"generations": {NAME: JSON schema with "description", ...}, "edits": {...}}}

Of a `mask`, what is transparent is painted anew, as OpenAI has it; of one without transparent pixels, what is white
(of `mask_image` always). lora: "style", {"name": "style", "scale": 0.8}, or a list of these; names as in /v1/options.
In edits every field but files is text: numbers, true and false, lists and objects as JSON.
'''
