"""A page and an HTTP API: recordings come in by upload, voices go out by download, and nothing stays.

In: the settings of `onevoice serve`, and requests. Out: the page, the API below `/v1`, its description at `/docs`. The
work itself is that of `extraction`, which knows nothing of requests. Files of a request lie in a private temporary
folder, and only saved voices outlive the process. `docs/security.md` says what is promised.
"""
