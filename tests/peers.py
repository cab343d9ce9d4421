"""Compares lengthwise with other programs on the same corpus and machine, in turn, in several rounds.

Prints medians, ratios and peak memory.

    python tests/peers.py LENGTHWISE CORPUS TOKENIZER [--rounds 5] [--catalog DIR --preview PREVIEW_SPEED]

CORPUS is a folder of SlimPajama's JSONL.zst files, TOKENIZER a tokenizer.json. The Python that runs this needs
datatrove[processing,io]==0.10.1, datasets, transformers, duckdb, tokenizers, zstandard and orjson; a program that
is not installed is named and left out. DIR is written by `cargo run --release --example synthetic_catalog`, and
PREVIEW_SPEED is the built example of that name.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

SEQUENCE = 8192

TOKENISE = """
import sys, os
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
if __name__ == "__main__":
    corpus, tokenizer, out, shuffle = sys.argv[1:]
    reader = JsonlReader(corpus, glob_pattern="*.jsonl.zst", text_key="text", compression="zstd")
    tokenise = DocumentTokenizer(output_folder=out + "/tokens", tokenizer_name_or_path=tokenizer, eos_token="</s>",
                                 shuffle_documents=shuffle == "yes", batch_size=256)
    LocalPipelineExecutor(pipeline=[reader, tokenise], tasks=4, workers=2, logging_dir=out + "/logs").run()
    if shuffle == "yes":
        merge = DocumentTokenizerMerger(input_folder=out + "/tokens", output_folder=out + "/merged", save_filename="all", shuffle=True)
        LocalPipelineExecutor(pipeline=[merge], tasks=1, logging_dir=out + "/logs2").run()
"""

# As transformers' run_clm.py does it: everything concatenated and cut into blocks.
PACK = """
import sys, os
os.environ["HF_HUB_OFFLINE"] = "1"
from itertools import chain
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
if __name__ == "__main__":
    corpus, tokenizer, out, size = sys.argv[1:]
    tokenizer, size = PreTrainedTokenizerFast(tokenizer_file=tokenizer), int(size)
    data = load_dataset("json", data_files=corpus + "/*.jsonl.zst", split="train", cache_dir=out + "/cache")
    data = data.map(lambda rows: {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]},
                    batched=True, num_proc=2, remove_columns=data.column_names)
    data = data.shuffle(seed=1)
    def group(rows):
        ids = list(chain(*rows["input_ids"]))
        return {"input_ids": [ids[i : i + size] for i in range(0, len(ids) // size * size, size)]}
    data.map(group, batched=True, num_proc=2).to_parquet(out + "/packed.parquet")
"""

DUCKDB = """
import sys, json, time, pathlib, duckdb
catalog, statistics, recipe = sys.argv[1:]
base = duckdb.connect(config={"threads": 2})
base.execute(f"create view catalog as select * from read_parquet('{catalog}/*.parquet')")
base.execute("create view documents as select doc_id, domain, tokens, bytes, origin from catalog")
began = time.time()
text = pathlib.Path(statistics).read_text().replace("make_array(", "list_value(")
base.execute("create table domains as " + text, {"long_tokens": 4096})
first = time.time() - began
base.execute("create table shares as select domain, share from domains")
parameters = {"long_share": 0.7, "short_keep": None, "budget": 5_000_000_000, "long_tokens": 4096, "max_copies": 4, "max_span": 131072}
began = time.time()
spans, tokens = base.execute(
    "select count(*), sum(copies * (stop - start)) from (" + pathlib.Path(recipe).read_text() + ")", parameters).fetchone()
print(json.dumps({"statistics": first, "recipe": time.time() - began, "spans": spans, "tokens": tokens}))
"""


def tree_memory(pid):
    """Resident bytes of a process and all of its descendants."""
    total, pids = 0, [pid]
    while pids:
        pid = pids.pop()
        try:
            total += int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            pids += map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except (OSError, IndexError):
            pass
    return total


def measure(command):
    """Runs a command; returns its seconds, its peak memory in megabytes, and its stdout."""
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(0.05):
            most[0] = max(most[0], tree_memory(process.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    out, err = process.communicate()
    done.set()
    watching.join()
    if process.returncode:
        sys.exit(f"{command[:3]} ended with {process.returncode}: {err[-2000:]}")
    return time.time() - began, most[0] / 1e6, out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengthwise")
    parser.add_argument("corpus")
    parser.add_argument("tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--catalog")
    parser.add_argument("--preview")
    args = parser.parse_args()
    root = pathlib.Path(__file__).parent.parent
    work = pathlib.Path(tempfile.mkdtemp())
    has = lambda package: importlib.util.find_spec(package) is not None

    def ours(until, *sets):
        out = work / "ours"
        shutil.rmtree(out, ignore_errors=True)
        settings = [f"source.0.url={args.corpus}/*.jsonl.zst", f"tokenizer.url={args.tokenizer}", f"run.output={out}", *sets]
        command = [args.lengthwise, "run", str(root / "conf/corpus.toml"), "--until", until, "--json"]
        return command + [part for setting in settings for part in ("--set", setting)]

    def python(program, *arguments):
        out = work / "peer"
        shutil.rmtree(out, ignore_errors=True)
        path = work / "peer.py"
        path.write_text(program)
        return [sys.executable, str(path), *[str(a).replace("OUT", str(out)) for a in arguments]]

    packed = ("mixture.recipe=sql/mixtures/cut_128k.sql", "mixture.budget=28M", "mixture.holdout=0", f"pack.sequence_tokens={SEQUENCE}")
    os.chdir(root)
    races = [
        ("tokenise", "datatrove", lambda: ours("tokens"), lambda: python(TOKENISE, args.corpus, args.tokenizer, "OUT", "no")),
        ("tokenise, shuffle", "datatrove", lambda: ours("pack", *packed), lambda: python(TOKENISE, args.corpus, args.tokenizer, "OUT", "yes")),
        ("tokenise, shuffle, pack", "datasets", lambda: ours("pack", *packed), lambda: python(PACK, args.corpus, args.tokenizer, "OUT", SEQUENCE)),
    ]
    print(f"| {'task':24} | {'peer':10} | ours, s | peer, s | ratio | ours, MB | peer, MB |\n|---|---|---|---|---|---|---|")
    for task, peer, we, they in races:
        if not has(peer):
            print(f"{peer} is not there: left out", file=sys.stderr)
            continue
        rounds = [(measure(we()), measure(they())) for _ in range(args.rounds)]
        row(task, peer, [(a[0], b[0]) for a, b in rounds], [(a[1], b[1]) for a, b in rounds])
    if args.catalog and args.preview and has("duckdb"):
        recipe, statistics_sql = root / "sql/mixtures/per_source.sql", root / "sql/stages/domains.sql"
        rounds = []
        for _ in range(args.rounds):
            a = measure([args.preview, str(recipe), args.catalog, "2"])
            b = measure(python(DUCKDB, args.catalog, statistics_sql, recipe))
            rounds.append((a, b, json.loads(b[2])))
        print(rounds[0][0][2], rounds[0][1][2], file=sys.stderr)
        memory = [(a[1], b[1]) for a, b, _ in rounds]
        said = lambda of, text: float(re.search(of + r" ([\d.]+) s", text)[1])
        row("statistics", "duckdb", [(said("domains:", a[2]), b["statistics"]) for a, _, b in rounds], memory)
        row("recipe, counted, summed", "duckdb", [(said("summed:", a[2]), b["recipe"]) for a, _, b in rounds], memory)
        checked = statistics.median(said("tokens,", a[2]) for a, _, _ in rounds)
        print(f"with every span checked against the catalog, which no peer does: {checked:.1f} s", file=sys.stderr)
    shutil.rmtree(work)


def row(task, peer, seconds, memory):
    median = statistics.median
    ratio = median(b / a for a, b in seconds)
    (ours, theirs), (our_memory, their_memory) = ([median(side) for side in zip(*pairs)] for pairs in (seconds, memory))
    print(f"| {task:24} | {peer:10} | {ours:.2f} | {theirs:.2f} | {ratio:.1f} | {our_memory:.0f} | {their_memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
