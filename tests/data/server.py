"""A server on this machine that cuts, ignores, refuses and changes."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves ``body`` at any path; the other attributes say how badly."""

    daemon_threads = True

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.url = f"http://127.0.0.1:{self.server_port}/file"
        self.ranges = True  # take Range requests
        self.cuts = 0  # how many answers to break off
        self.cut_at = 300_000  # bytes of an answer before it breaks off
        self.answers = []  # status codes to give before serving
        self.etag = '"one"'
        self.mute = False  # accept, then say nothing
        self.chunked = False  # no Content-Length
        self.seen = []  # Range headers of the requests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.seen.append(self.headers.get("Range"))
        if server.mute:
            server.released.wait()
            return
        if server.answers:
            self.send_error(server.answers.pop(0))
            return
        start = 0
        same = self.headers.get("If-Range", server.etag) == server.etag
        if server.ranges and same and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            total = len(server.body)
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("ETag", server.etag)
        body = server.body[start:]
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts > 0 and len(body) > server.cut_at
        if cut:
            server.cuts -= 1
            body = body[: server.cut_at]
            self.close_connection = True
        if server.chunked:
            body = b"%x\r\n" % len(body) + body + b"\r\n" + (b"" if cut else b"0\r\n\r\n")
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(body):
    """A `Server` that runs."""
    with Server(body) as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
