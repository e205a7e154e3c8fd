"""A server on the loopback that answers as OpenAI-compatible servers do, for tests of what asks one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from negtome.guard import Decision

#: Where a reply has the nonce that it was asked to repeat.
NONCE = "<nonce>"
GOOD = Decision("steer", ("C1",), "fangs", "it is one").to_json(NONCE)
SECRET = "sk-that-nobody-may-see"


def completion(content, finish="stop", prompt_tokens=900, **more):
    message = {"role": "assistant", "content": content, **more}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1},
    }


def sight(clause, probability=..., nonce=NONCE, **more):
    """What a model says of an image."""
    if probability is ...:  # that the image shows a concept
        probability = 0.1 if clause is None else 0.9
    return json.dumps({"nonce": nonce, "clause": clause, "probability": probability, **more})


def nonce_of(asked):
    return asked["messages"][0]["content"].split()[-1]


class Server:
    """Answers every request by `answer`, with the request's nonce for `NONCE`; remembers what it was sent.

    An answer is a document or bytes, a status and one of them, or these and headers. Those in `first` are given before,
    each once.
    """

    def __init__(self):
        self.answer, self.first, self.asked, self.release = completion(GOOD), [], [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                asked = json.loads(body)
                outer.asked.append((self.path, self.headers, asked))
                answer = outer.first.pop(0) if outer.first else outer.answer
                if answer is None:  # too late for anybody who waits
                    outer.release.wait(30)
                    return
                status, document, *headers = answer if isinstance(answer, tuple) else (200, answer)
                raw = isinstance(document, bytes)
                nonce = nonce_of(asked) if "messages" in asked else ""
                content = (document if raw else json.dumps(document).encode()).replace(NONCE.encode(), nonce.encode())
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if raw and document[:1] == b"<" else "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
