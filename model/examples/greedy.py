"""Compares greedy continuations of transformers and `lengthwise generate`, for ten prompts of 100 to 4,000 tokens.

    pip install torch==2.9.0 transformers==4.57.3
    python greedy.py LENGTHWISE CHECKPOINT TEXTS.txt [--device DEVICE]... [--ranks N]...

LENGTHWISE is the program, and TEXTS.txt any long text. Prints a line for each prompt, device and number of ranks: whether the
ids are the same and, if not, by how much transformers' logits differ where they part. Exits with 1 if that is more than
rounding.
"""

import argparse
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

arguments = argparse.ArgumentParser()
arguments.add_argument("program")
arguments.add_argument("checkpoint")
arguments.add_argument("texts")
arguments.add_argument("--device", action="append")
arguments.add_argument("--ranks", action="append")
arguments.add_argument("--tokens", type=int, default=40)
arguments = arguments.parse_args()

# Both compute in f32, so they differ only in the order of sums.
model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, torch_dtype=torch.float32).eval()
tokenizer = PreTrainedTokenizerFast(tokenizer_file=arguments.checkpoint + "/tokenizer.json")
text = open(arguments.texts, encoding="utf-8").read()
wrong = 0
for i, length in enumerate([100, 200, 350, 500, 800, 1200, 1600, 2200, 3000, 4000]):
    ids = tokenizer(text[7000 * i:], return_tensors="pt").input_ids[:, :length]
    prompt = tokenizer.decode(ids[0])
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        all_ids = model.generate(ids, max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)[0]
    for device in arguments.device or ["flex"]:
        for ranks in arguments.ranks or ["1"]:
            command = [arguments.program, "generate", arguments.checkpoint, "--prompt", prompt, "--ids"]
            command += ["--tokens", str(arguments.tokens), "--device", device, "--ranks", ranks]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            ours = [int(id) for id in said.split()]
            theirs = all_ids[ids.shape[1]:].tolist()
            same = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
            verdict = f"the same {len(theirs)} ids" if ours == theirs else f"part at {same}"
            if same is not None:
                with torch.no_grad():
                    logits = model(all_ids[None, : ids.shape[1] + same]).logits[0, -1]
                gap = (logits[theirs[same]] - logits[ours[same]]).item()
                verdict += f", where theirs is likelier by {gap:.1e}"
                wrong += gap > 1e-3
            elif ours != theirs:
                wrong += 1
            print(f"{ids.shape[1]:5} tokens, {device}, {ranks} ranks: {verdict}", flush=True)
sys.exit(wrong > 0)
