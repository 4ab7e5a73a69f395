"""Google Cloud Storage in memory: as much of its JSON API as gcsfs and TensorStore speak, preconditions included.

Environment variables (`Bucket.environment`) send both here, so that what runs is their real code and the program's.
Written from https://cloud.google.com/storage/docs/json_api/v1; there is one bucket, and no access control.
"""

import contextlib
import http.server
import json
import re
import sys
import threading
import urllib.parse


class Bucket:
  """Objects by name: (generation, bytes). A generation is never given twice."""

  def __init__(self):
    self.lock, self.objects, self.generation = threading.Lock(), {}, 1000
    self.uploads = {}  # resumable ones under way: number -> (name, bytes so far)
    self.before_write = lambda name: True  # may wait; returning False refuses the write, as without permission

  def put(self, name, data):
    self.generation += 1
    self.objects[name] = (self.generation, bytes(data))
    return self.describe(name)

  def describe(self, name):
    generation, data = self.objects[name]
    when = "2026-01-01T00:00:00.000Z"
    return {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(data)), "metageneration": "1",
            "generation": str(generation), "contentType": "application/octet-stream", "timeCreated": when,
            "updated": when, "storageClass": "STANDARD", "etag": str(generation)}

  def listing(self, prefix="", delimiter="", startOffset="", endOffset="", maxResults="1000", pageToken="", **_):
    names, prefixes = [], []
    with self.lock:
      for name in sorted(self.objects):
        if not name.startswith(prefix) or name < startOffset or (endOffset and name >= endOffset):
          continue
        head, found, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, "", "")
        (prefixes if found else names).append(prefix + head + delimiter if found else name)
      rows = sorted({(p, True) for p in prefixes} | {(n, False) for n in names})
      rows = [row for row in rows if row[0] > pageToken]
      page, more = rows[:int(maxResults)], rows[int(maxResults):]
      answer = {"kind": "storage#objects", "items": [self.describe(n) for n, is_prefix in page if not is_prefix],
                "prefixes": [n for n, is_prefix in page if is_prefix]}
    return answer | ({"nextPageToken": page[-1][0]} if more else {})


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def log_message(self, *args):
    pass

  def _answer(self, status, body=b"", **headers):
    body = json.dumps(body).encode() if not isinstance(body, bytes) else body
    self.send_response(status)
    for key, value in ({"Content_Type": "application/json", "Content_Length": str(len(body))} | headers).items():
      self.send_header(key.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(body)

  def _body(self):
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    parts = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def _kept(self, query, name):
    """Whether the preconditions hold: ifGenerationMatch, 0 meaning that there is none yet."""
    now = self.bucket.objects.get(name, (0, b""))[0]
    return (int(query.get("ifGenerationMatch", now)) == now
            and ("ifGenerationNotMatch" not in query or int(query["ifGenerationNotMatch"]) != now))

  def _write(self, query, name, data):
    bucket = self.bucket
    if not bucket.before_write(name):
      return self._answer(403, {"error": {"code": 403, "message": "does not have storage.objects.create access"}})
    with bucket.lock:
      kept = self._kept(query, name)
      described = bucket.put(name, data) if kept else None
    if not kept:
      return self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
    return self._answer(200, described)

  def _serve(self):
    path, _, text = self.path.partition("?")
    query = dict(urllib.parse.parse_qsl(text))
    parts = [urllib.parse.unquote(p) for p in path.split("/") if p]
    body, bucket = self._body(), self.bucket
    missing = (404, {"error": {"code": 404, "message": f"No such object: {path}"}})
    upload, download = parts[0] == "upload", parts[0] == "download"
    parts = parts[1:] if upload or download else parts
    if parts[:4] != ["storage", "v1", "b", "bucket"] or (rest := parts[4:]) and rest[0] != "o":
      return self._answer(*missing)
    name = rest[1] if len(rest) > 1 else None
    if upload:
      return self._upload(query, body)
    if not rest:
      about = {"kind": "storage#bucket", "name": "bucket", "location": "US", "storageClass": "STANDARD"}
      return self._answer(200, about)
    if name is None:
      return self._answer(200, bucket.listing(**query))
    if len(rest) > 2:  # moveTo/o/NAME, rewriteTo/b/BUCKET/o/NAME
      with bucket.lock:
        if name not in bucket.objects:
          return self._answer(*missing)
        described = bucket.put(rest[-1], bucket.objects[name][1])
        if rest[2] == "moveTo":
          del bucket.objects[name]
      size = described["size"]
      return self._answer(200, described if rest[2] == "moveTo" else {
          "kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True,
          "resource": described})
    with bucket.lock:
      if name not in bucket.objects:
        return self._answer(*missing)
      generation, data = bucket.objects[name]
      kept, described = self._kept(query, name), bucket.describe(name)
      if kept and self.command == "DELETE":
        del bucket.objects[name]
    if not kept:
      return self._answer(304 if "ifGenerationNotMatch" in query else 412)
    if self.command == "DELETE":
      return self._answer(204)
    if query.get("alt") != "media" and not download:
      return self._answer(200, described)
    headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
    if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
      first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
      if first >= len(data):
        return self._answer(416)
      return self._answer(206, data[first:last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)
    return self._answer(200, data, **headers)

  def _upload(self, query, body):
    kind = query.get("uploadType")
    if kind == "media":
      return self._write(query, query["name"], body)
    if kind == "multipart":
      boundary = b"\r?\n?--" + re.escape(re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode())
      parts = re.split(boundary, body, maxsplit=3)[1:3]
      description, data = (re.split(b"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
      return self._write(query, json.loads(description)["name"], data)
    if "upload_id" not in query:
      number = str(len(self.bucket.uploads))
      self.bucket.uploads[number] = (query["name"], b"")
      there = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}"
      return self._answer(200, {}, Location=there)
    name, data = self.bucket.uploads[query["upload_id"]]
    data += body
    self.bucket.uploads[query["upload_id"]] = (name, data)
    if int(self.headers["Content-Range"].rpartition("/")[2]) > len(data):
      return self._answer(308, b"", Range=f"bytes=0-{len(data) - 1}")
    return self._write(query, name, data)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, request, client_address):
    if not isinstance(sys.exc_info()[1], ConnectionError):  # those are clients that were killed
      super().handle_error(request, client_address)


@contextlib.contextmanager
def serve():
  """A bucket of the name `bucket`, and what to add to the environment for gs://bucket to mean it."""
  bucket = Bucket()
  handler = type("Handler", (_Handler,), {"bucket": bucket})
  server = _Server(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  there = f"http://127.0.0.1:{server.server_port}"
  bucket.environment = {"STORAGE_EMULATOR_HOST": there, "TENSORSTORE_GCS_HTTP_URL": there,
                        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
  try:
    yield bucket
  finally:
    server.shutdown()
    server.server_close()
