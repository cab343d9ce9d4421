"""Prints what Hugging Face's packages read from a run's directory, as a line of JSON. With torch, also the ids that
the model generates after a text."""

import importlib.util
import json
import pathlib
import sys

import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

run, text = pathlib.Path(sys.argv[1]), sys.argv[2]
checkpoint = str(run / "checkpoint")
has = lambda package: importlib.util.find_spec(package) is not None

config = AutoConfig.from_pretrained(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
ids = tokenizer(text)["input_ids"]
with safe_open(checkpoint + "/model.safetensors", "np") as weights:
    shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}
found = {
    "transformers": transformers.__version__,
    "config": type(config).__name__,
    # where it is depends on the version of transformers
    "rope_theta": getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"],
    "rope_type": (getattr(config, "rope_scaling", None) or config.rope_parameters)["rope_type"],
    "factor": (getattr(config, "rope_scaling", None) or config.rope_parameters)["factor"],
    "do_sample": GenerationConfig.from_pretrained(checkpoint).do_sample,
    "tokenizer": type(tokenizer).__name__,
    "ids": ids,
    "decoded": tokenizer.decode(ids, skip_special_tokens=True),
    "embedding": shapes["model.embed_tokens.weight"],
    "tensors": len(shapes),
}
if has("datasets"):
    from datasets import load_dataset

    splits = load_dataset(str(run), cache_dir=sys.argv[3])
    found["splits"] = {name: split.num_rows for name, split in splits.items()}
    found["sequence"] = len(splits["train"][0]["input_ids"])
if has("torch"):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    found["loading"] = sorted(str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key])
    with torch.no_grad():
        continued = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    found["continued"] = continued[0, len(ids) :].tolist()
print(json.dumps(found))
