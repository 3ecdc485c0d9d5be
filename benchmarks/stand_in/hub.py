"""A hub on this machine, which lists and sends files as Hugging Face and ModelScope do."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5" * 40
Files = dict[str, bytes]


class Hub:
    """Repositories in memory: {"datasets/owner/name": {file: bytes}}; and what was asked for."""

    def __init__(self, repos: dict[str, Files]):
        self.repos, self.gets = repos, []  # (file, Range or None)
        self.commit = COMMIT  # the newest one of each repository
        self.has_history = True  # some mirrors have none
        self.older: dict[str, dict[str, Files]] = {}  # repository → its commits before
        self.small: set[str] = set()  # files that git itself holds
        self.damaged: dict[str, bytes] = {}  # what is sent instead
        self.cut_after: int | None = None  # bytes after which the next answer breaks off
        self.wait: threading.Event | None = None  # for which an answer stops half-way

    def files(self, repo: str, revision: str) -> Files | None:
        """The files at a revision; None if there is no such revision."""
        if revision in ("main", self.commit):
            return self.repos[repo]
        return self.older.get(repo, {}).get(revision)

    def commits(self, repo: str) -> list[dict]:
        about = {"title": "data", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        return [{"id": commit, **about} for commit in [self.commit, *self.older.get(repo, {})]]

    def about(self, repo: str, revision: str) -> dict:
        siblings = []
        for name, content in (self.files(repo, revision) or {}).items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            file = {"rfilename": name, "size": len(content), "blobId": git}
            if name not in self.small:
                sha256 = hashlib.sha256(content).hexdigest()
                file["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 130}
            siblings.append(file)
        name = repo.split("/", 1)[1]
        sha = self.commit if revision == "main" else revision
        return {"id": name, "sha": sha, "siblings": siblings, "tags": [], "private": False}


@contextmanager
def serving(hub: Hub):
    """The address of a server that speaks for `hub`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status: int, content: bytes, **headers: str):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "HEAD":
                return
            of_a_file = "/resolve/" in self.path or "FilePath=" in self.path
            if of_a_file and hub.wait is not None:
                half = len(content) // 2
                self.wfile.write(content[:half])
                hub.wait.wait(30)
                content = content[half:]
            if of_a_file and hub.cut_after is not None:
                content, hub.cut_after = content[: hub.cut_after], None
                self.close_connection = True
            self.wfile.write(content)

        def do_GET(self):
            url = urlsplit(self.path)
            path = unquote(url.path).strip("/")
            if path.startswith("api/v1/"):
                return self.modelscope(path, parse_qs(url.query))
            for repo in hub.repos:
                if path.startswith(f"{repo.removeprefix('models/')}/resolve/"):
                    revision, name = path.split("/resolve/", 1)[1].split("/", 1)
                    return self.file(name, hub.files(repo, revision) or {})
                if path.startswith(f"api/{repo}/commits/"):
                    found = json.dumps(hub.commits(repo)).encode()
                    return self.answer(200, found) if hub.has_history else self.answer(404, b"{}")
                if f"{path}/".startswith(f"api/{repo}/"):
                    revision = path.partition("/revision/")[2] or "main"
                    if hub.files(repo, revision) is None:
                        return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                    return self.answer(200, json.dumps(hub.about(repo, revision)).encode())
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def modelscope(self, path: str, query: dict[str, list[str]]):
            (files,) = hub.repos.values()
            if "FilePath" in query:
                return self.file(query["FilePath"][0], files)
            data = {"Id": 7, "Type": 1}
            if path == "api/v1/datasets/7/repo/tree":
                data["Files"] = [
                    {
                        "Path": name,
                        "Size": len(content),
                        "Sha256": hashlib.sha256(content).hexdigest(),
                        "Type": "blob",
                    }
                    for name, content in files.items()
                ]
            answer = {"Code": 200, "Success": True, "Data": data}
            self.answer(200, json.dumps(answer).encode())

        def file(self, name: str, files: dict[str, bytes]):
            hub.gets.append((name, self.headers.get("Range")))
            content = hub.damaged.get(name, files.get(name))
            if content is None:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            begin = self.headers.get("Range")
            if begin is None:
                return self.answer(200, content)
            start = int(begin.removeprefix("bytes=").split("-")[0])
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], Content_Range=place)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
