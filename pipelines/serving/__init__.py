"""The render service: Ray Serve answers single requests and batches with the batch path's stages, ledger and storage.

What a client must know; the served /openapi.json has every field.

    POST   /v1/videos                    202, a video. multipart (files `photo` or `input_reference`) or JSON (base64)
    GET    /v1/videos?limit&after&order  a page: data, first_id, last_id, has_more
    GET    /v1/videos/{id}               queued, in_progress (progress, step, eta_seconds), completed, failed (error)
    DELETE /v1/videos/{id}               deletes it; its work stops before its next step
    DELETE /v1/videos?before=            deletes all older ones that have ended                            (admin)
    POST   /v1/videos/{id}/remix         202, the same person and settings with another prompt
    GET    /v1/videos/{id}/content       ?variant=video (ranges), thumbnail, photo, face
    GET    /v1/videos/{id}/record        how it was made
    GET    /v1/videos/{id}/events        server-sent events: `video`, `preview` {step, jpeg: data:}, `deleted`
    POST   /v1/identities                checks a photo: usable, refusal, box, quality, crop (data:); keeps nothing
    GET    /v1/estimate, /v1/options     how long a video would take; what may be asked, for a form
    POST   /v1/batches                   202, a batch: {"manifest": ...}; asked again, it goes on
    GET    /v1/batches, /v1/batches/{id} counts, and where results table, report and contact sheet are
    POST   /v1/batches/{id}/cancel       DELETE /v1/batches/{id}                                            (admin)
    GET    /v1/files/{path}              those views, and videos under the names that reports link to
    GET    /                             the page, a browser's client of all this
    GET    /healthz, /metrics            200 once at work; Prometheus                                       (admin)

Who calls: `Authorization: Bearer ev_...`, or a browser's cookie. `POST /v1/sign-in-links` makes a link, good once for
15 minutes; `GET /sign-in?token=` shows one button, whose POST sets the cookie (HttpOnly, SameSite=Strict, 12 hours) and
goes to `/`. `GET /v1/session` returns csrf_token, which a browser's POST and DELETE carry in X-CSRF-Token. Scopes: read
to see, render to make, check and delete, admin for what is marked. Another tenant's ids are answered like unknown ones,
and so are the identities that it registered: `identity_lora` names those in the tenant's own output.

Errors are application/problem+json: status, detail, and the batch path's `code`. 401, 403, 429 and 503 say
Retry-After. The same Idempotency-Key with the same body is the same video; with another body it is refused with 422.
"""
